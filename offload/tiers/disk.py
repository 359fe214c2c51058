"""Reads extents of files into memory at the speed of the drive.

Owns the order of reads: demand before prefetch, first come first served within each. Must not know what the bytes
mean nor which slot is worth what.

Large extents are cut into parts, so that a single expert keeps several reads in the drive's queue. Parts are handed
to the kernel where it reads without a thread (see `aio`), otherwise to reader threads, which also try again what
the kernel could not read. Direct I/O needs offset, length and address to be multiples of a page: where an extent is
not, the enclosing pages are read and `Read.skip` says where the extent begins in the destination.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

from offload.errors import DiskError
from offload.tiers.aio import Request
from offload.tiers.attempts import Attempts
from offload.tiers.copies import Copies, Copy, FileSystem, Posix
from offload.tiers.reads import Part, Read, cut
from offload.types import align_up

log = logging.getLogger("expertpager")

READERS = 8
"""Reads under way at most, unless told otherwise."""

PART_NBYTES = 4 << 20
"""Larger extents are read in parts of this size at the same time: smaller ones gain a fast drive nothing and cost
time each."""

GRACE_S = 2e-4
"""Whoever has taken one read often comes back for the next one within this time."""

CLOSE_S = 5.0
"""Patience with reads under way when the reader is closed: a drive that has vanished may never answer."""


@dataclass
class ReadCounters:
    """What the readers did since the start."""

    reads: int = 0
    bytes_read: int = 0
    """Bytes of whole extents delivered (not of the enclosing pages)."""
    retries: int = 0
    busy_s: float = 0.0
    """Time with at least one read under way."""


class DiskReader:
    """Reads `threads` parts at a time. Completed reads come back from `completed` in order of arrival.

    With `mirror`, a directory that holds the same files as the one of the extents, every part is read
    from the copy with the shorter queue, and from the other one if that fails.
    """

    def __init__(
        self,
        *,
        threads: int = READERS,
        part_nbytes: int = PART_NBYTES,
        mirror: Path | None = None,
        prefetch_limit: int = 64,
        system: FileSystem | None = None,
        backoff_s: float = 0.01,
    ) -> None:
        self.counters = ReadCounters()
        self._limit = max(1, threads)
        self._part_nbytes = align_up(part_nbytes)
        self._prefetch_limit = prefetch_limit
        self._system = system or Posix()
        self._copies = Copies(mirror, self._system)
        self._attempts = Attempts(self._copies, self._system, backoff_s, self._tried_again)
        self._demand: deque[Part] = deque()
        self._prefetch: deque[Part] = deque()
        self._done: SimpleQueue[Read] = SimpleQueue()
        self._lock = threading.Lock()
        self._quiet = threading.Condition(self._lock)
        self._active = 0  # parts that have left the queues and have not ended
        self._in_threads = 0  # of those, parts that a thread is reading
        self._open_reads = 0
        self._busy_since = 0.0
        self._closing = False
        # Parts for threads, which are made when the first of those comes.
        self._blocking: deque[Part] = deque()
        self._work = threading.Condition(self._lock)
        self._threads: list[threading.Thread] = []
        # Parts in the kernel by tag. Whoever waits for a read takes the ends of reads itself, which spares it the
        # time that another thread needs to wake up; while nobody waits, a thread does, and sleeps otherwise: woken by
        # the same ends it would ask for the interpreter at the very moment at which the other one needs it.
        self._kernel = self._system.kernel_reads(self._limit)
        self._in_kernel: dict[int, tuple[Part, Copy]] = {}
        self._tags = list(range(self._limit))
        self._awaited = False
        self._unattended = threading.Condition(self._lock)
        self._attendants = [] if self._kernel is None else [_start(self._attend, "expert-reads")]

    # -- the caller's side -------------------------------------------------------------------

    def submit(self, reads: Sequence[Read]) -> None:
        """Queue demand reads. The drive begins with the first of them while the next ones are prepared."""
        with self._lock:
            for read in reads:
                self._enqueue(read, self._demand)
                self._dispatch()

    def prefetch(self, read: Read) -> bool:
        """Queue a read that gives way to every demand; False if the queue is full."""
        read.prefetch = True
        with self._lock:
            if len(self._prefetch) >= self._prefetch_limit:
                return False
            self._enqueue(read, self._prefetch)
            self._dispatch()
            return True

    def promote(self, read: Read) -> None:
        """A queued prefetch has become a demand."""
        with self._lock:
            mine = [part for part in self._prefetch if part.read is read]
            for part in mine:
                self._prefetch.remove(part)
            self._demand.extend(mine)
            read.prefetch = False

    def cancel(self, read: Read) -> bool:
        """Withdraw a prefetch none of whose bytes have been asked for; False if it is too late."""
        with self._lock:
            if read.started or read.cancelled or not read.prefetch:
                return False
            self._prefetch = deque(part for part in self._prefetch if part.read is not read)
            self._open_reads -= 1
            read.cancelled = True
            return True

    def completed(self, wait: bool = True) -> Read | None:
        """The next read that has ended, well or with `error`; None if there is none (yet)."""
        if not wait:
            if self._kernel is not None:
                self._reap()
            try:
                read = self._done.get_nowait()
            except Empty:
                return None
        else:
            with self._lock:
                if self._open_reads == 0:
                    return None
            read = self._await()
        with self._lock:
            self._open_reads -= 1
        return read

    def abandon(self) -> None:
        """Forget every read: what is queued is dropped, what is under way is waited for, nothing is delivered.

        Right also when the caller was interrupted anywhere in this class, whatever that left half done.
        """
        with self._lock:
            self._demand.clear()
            self._prefetch.clear()
            self._blocking.clear()
            self._awaited = False
            self._unattended.notify()
            while self._in_threads:
                self._quiet.wait()
            if self._kernel is not None:
                self._kernel.restart()
                self._in_kernel.clear()
                self._tags = list(range(self._limit))
            if self._active:
                self.counters.busy_s += time.perf_counter() - self._busy_since
            self._active = 0
            self._copies.all_done()
            self._done = SimpleQueue()
            self._open_reads = 0

    @property
    def idle(self) -> bool:
        """Whether no read is queued or under way."""
        if self._kernel is not None:
            self._reap()
        with self._lock:
            return not (self._active or self._demand or self._prefetch)

    @property
    def buffered(self) -> bool:
        """Whether some file was read through the page cache, because direct I/O was refused."""
        return self._copies.buffered

    @property
    def queued_parts(self) -> int:
        """Parts that nobody has begun to read yet."""
        with self._lock:
            return len(self._demand) + len(self._prefetch)

    def snapshot(self) -> ReadCounters:
        """The counters, including a busy period that has not ended."""
        with self._lock:
            now = time.perf_counter()
            busy = self.counters.busy_s + (now - self._busy_since if self._active else 0.0)
            return ReadCounters(self.counters.reads, self.counters.bytes_read, self.counters.retries, busy)

    def close(self) -> None:
        """Stop the threads and give back the files; queued reads are dropped. Harmless when repeated."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._demand.clear()
            self._prefetch.clear()
            self._work.notify_all()
            self._unattended.notify_all()
        if self._kernel is not None:
            self._kernel.wake()
        deadline = time.perf_counter() + CLOSE_S
        threads = self._threads + self._attendants
        for thread in threads:
            thread.join(max(0.0, deadline - time.perf_counter()))
        if any(thread.is_alive() for thread in threads):
            log.warning("the drive does not answer; its reads are left behind")
            return
        if self._kernel is not None:
            self._kernel.close()
        self._copies.close()

    # -- from the queues to the kernel or a thread; the lock is held ----------------------------

    def _enqueue(self, read: Read, queue: deque[Part]) -> None:
        queue.extend(cut(read, self._part_nbytes))
        self._open_reads += 1

    def _dispatch(self) -> None:
        """Begin to read as many parts as may be under way."""
        while self._active < self._limit and (self._demand or self._prefetch):
            part = self._demand.popleft() if self._demand else self._prefetch.popleft()
            part.read.started = True
            if self._active == 0:
                self._busy_since = time.perf_counter()
            self._active += 1
            if not self._enter_kernel(part):
                self._blocking.append(part)
        if self._blocking:
            if not self._threads:
                self._threads = [_start(self._run, f"expert-reader-{n}") for n in range(self._limit)]
            self._work.notify(len(self._blocking))
        if self._in_kernel and not self._awaited:
            self._unattended.notify()

    def _enter_kernel(self, part: Part) -> bool:
        """Let the kernel read `part`; False if a thread must, and tell what is wrong, if anything."""
        if self._kernel is None or part.read.error is not None:
            return False
        copy = self._copies.choose()
        try:
            file = self._copies.descriptor(copy, copy.path(part.read.extent.path))
        except OSError:
            file = None
        if file is None or not file.kernel:
            self._copies.done(copy)
            return False
        tag = self._tags.pop()
        self._in_kernel[tag] = part, copy
        if self._kernel.submit(Request(tag, file.fd, part.read.address + part.start, part.nbytes, part.offset)):
            return True
        self._leave_kernel(tag)
        return False

    def _leave_kernel(self, tag: int) -> Part:
        part, copy = self._in_kernel.pop(tag)
        self._tags.append(tag)
        self._copies.done(copy)
        return part

    def _finish(self, part: Part, error: DiskError | None) -> None:
        """A part has been read, or cannot be."""
        read = part.read
        self._active -= 1
        if self._active == 0:
            self.counters.busy_s += time.perf_counter() - self._busy_since
            self._copies.close_retired()
        read.error = read.error or error
        read.parts_left -= 1
        if read.parts_left == 0:
            if read.error is None:
                self.counters.reads += 1
                self.counters.bytes_read += read.extent.nbytes
            self._done.put(read)

    # -- reads of the kernel -----------------------------------------------------------------

    def _await(self) -> Read:
        """The next read that has ended, which will."""
        if self._kernel is None:
            return self._done.get()
        try:
            return self._done.get_nowait()
        except Empty:
            pass
        with self._lock:
            self._awaited = True
        try:
            while True:
                self._reap()
                try:
                    return self._done.get_nowait()
                except Empty:
                    self._kernel.wait()
        finally:
            with self._lock:
                self._awaited = False
                if self._in_kernel:
                    self._unattended.notify()

    def _attend(self) -> None:
        """Take the ends of the kernel's reads while nobody waits for them."""
        assert self._kernel is not None
        while True:
            with self._lock:
                while not self._closing and (self._awaited or not self._in_kernel):
                    self._unattended.wait()
                if self._closing and not self._in_kernel:
                    return
            time.sleep(GRACE_S)
            if self._somebody_waits():
                continue
            self._kernel.wait()
            if self._somebody_waits():
                continue
            self._reap()
            with self._lock:
                if self._awaited:  # the signal it waits for may be the one just taken
                    self._kernel.wake()

    def _somebody_waits(self) -> bool:
        with self._lock:
            return self._awaited and not self._closing

    def _reap(self) -> None:
        assert self._kernel is not None
        with self._lock:
            ended = self._kernel.reap()
            for tag, result in ended:
                part = self._leave_kernel(tag)
                if result >= part.needed:
                    self._finish(part, None)
                else:
                    self.counters.retries += 1
                    self._blocking.append(part)
            if ended:
                self._dispatch()

    # -- reads of a thread -------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._lock:
                while not (self._blocking or self._closing):
                    self._work.wait()
                if self._closing:
                    return
                part = self._blocking.popleft()
                self._in_threads += 1
                skip = part.read.error is not None
            error = None if skip else self._attempts.read(part)
            with self._lock:
                self._in_threads -= 1
                self._quiet.notify_all()
                self._finish(part, error)
                self._dispatch()
                if self._awaited and self._kernel is not None:
                    self._kernel.wake()

    def _tried_again(self) -> None:
        with self._lock:
            self.counters.retries += 1


def _start(run: Callable[[], None], name: str) -> threading.Thread:
    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread
