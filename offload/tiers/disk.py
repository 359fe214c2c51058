"""Reads extents of files into memory at the speed of the drive.

Owns file handles, reader threads and the order of reads: demand before prefetch, first come first
served within each. Must not know what the bytes mean nor which slot is worth what.

Large extents are cut into parts, so that a single expert keeps several reads in the drive's queue.
Direct I/O needs offset, length and address to be multiples of a page: where an extent is not, the
enclosing pages are read and `Read.skip` says where the extent begins in the destination.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from shlex import quote
from typing import Any, Protocol

from offload.errors import DiskError
from offload.types import PAGE, Extent, align_up

log = logging.getLogger("expertpager")

READERS = 8
"""Reader threads, unless told otherwise: more reads than these are never under way."""

PART_NBYTES = 4 << 20
"""Larger extents are read in parts of this size at the same time: a smaller part costs a fast drive more waiting for
its thread than it gains."""

ATTEMPTS = 4
"""Reads of one part before it is given up."""

CLOSE_S = 5.0
"""Patience with reads under way when the reader is closed: a drive that has vanished may never answer."""

_TRANSIENT = frozenset({errno.EIO, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.ENOMEM, errno.EBUSY})


class FileSystem(Protocol):
    """The system calls used here; tests put a slow, reordering, failing one in their place."""

    def open(self, path: Path, direct: bool) -> int:
        """A descriptor for reading. OSError EINVAL if direct I/O is refused."""

    def size(self, fd: int) -> int:
        """Bytes of the file."""

    def read(self, fd: int, buffer: memoryview, offset: int) -> int:
        """Bytes read into `buffer`, which may be fewer than it holds."""

    def close(self, fd: int) -> None:
        """Give the descriptor back."""


class Posix:
    """The real system calls."""

    def open(self, path: Path, direct: bool) -> int:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | (getattr(os, "O_DIRECT", 0) if direct else 0))

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def read(self, fd: int, buffer: memoryview, offset: int) -> int:
        return os.preadv(fd, [buffer], offset)

    def close(self, fd: int) -> None:
        os.close(fd)


@dataclass(eq=False)
class Read:
    """One extent on its way into `buffer`, which must be page aligned and have room for its pages."""

    extent: Extent
    buffer: memoryview
    what: str
    """Names the extent in error messages: `expert 3 of layer 7`."""
    tag: Any = None
    prefetch: bool = False
    error: DiskError | None = None
    started: bool = False
    cancelled: bool = False
    _parts_left: int = 0

    @property
    def skip(self) -> int:
        """Offset of the extent's first byte in `buffer`."""
        return self.extent.offset % PAGE


@dataclass
class ReadCounters:
    """What the readers did since the start."""

    reads: int = 0
    bytes_read: int = 0
    """Bytes of whole extents delivered (not of the enclosing pages)."""
    retries: int = 0
    busy_s: float = 0.0
    """Time with at least one read under way."""


@dataclass(frozen=True, eq=False)
class _Part:
    read: Read
    offset: int  # in the file, a multiple of PAGE
    start: int  # in the buffer, a multiple of PAGE
    nbytes: int  # a multiple of PAGE
    needed: int  # bytes of it that must arrive; the rest may lie beyond the end of the file


@dataclass
class _Copy:
    """One copy of the store's files and the load on its drive."""

    root: Path | None
    outstanding: int = 0
    files: dict[Path, int] = field(default_factory=dict)
    buffered: set[Path] = field(default_factory=set)
    retired: list[int] = field(default_factory=list)
    """Descriptors that another thread may still be reading from."""


class DiskReader:
    """A pool of reader threads. Completed reads come back from `completed` in order of arrival.

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
        self._part_nbytes = align_up(part_nbytes)
        self._prefetch_limit = prefetch_limit
        self._system = system or Posix()
        self._backoff_s = backoff_s
        self._copies = [_Copy(None)] + ([_Copy(Path(mirror))] if mirror else [])
        self._demand: deque[_Part] = deque()
        self._prefetch: deque[_Part] = deque()
        self._done: SimpleQueue[Read] = SimpleQueue()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._quiet = threading.Condition(self._lock)
        self._active = 0
        self._open_reads = 0
        self._busy_since = 0.0
        self._closing = False
        self._threads = [
            threading.Thread(target=self._run, name=f"expert-reader-{n}", daemon=True) for n in range(max(1, threads))
        ]
        for thread in self._threads:
            thread.start()

    # -- the caller's side -------------------------------------------------------------------

    def submit(self, reads: Sequence[Read]) -> None:
        """Queue demand reads."""
        with self._work:
            for read in reads:
                self._enqueue(read, self._demand)
            self._work.notify(min(len(self._demand), len(self._threads)))

    def prefetch(self, read: Read) -> bool:
        """Queue a read that gives way to every demand; False if the queue is full."""
        read.prefetch = True
        with self._work:
            if len(self._prefetch) >= self._prefetch_limit:
                return False
            self._enqueue(read, self._prefetch)
            self._work.notify()
            return True

    def promote(self, read: Read) -> None:
        """A queued prefetch has become a demand."""
        with self._work:
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
            try:
                read = self._done.get_nowait()
            except Empty:
                return None
        else:
            with self._lock:
                if self._open_reads == 0:
                    return None
            read = self._done.get()
        with self._lock:
            self._open_reads -= 1
        return read

    def abandon(self) -> None:
        """Forget every read: what is queued is dropped, what is under way is waited for, nothing is delivered.

        Right also when the caller was interrupted between taking a read from `completed` and noting it.
        """
        with self._work:
            self._demand.clear()
            self._prefetch.clear()
            while self._active:
                self._quiet.wait()
            self._done = SimpleQueue()
            self._open_reads = 0

    @property
    def idle(self) -> bool:
        """Whether no read is queued or under way."""
        with self._lock:
            return not (self._active or self._demand or self._prefetch)

    @property
    def buffered(self) -> bool:
        """Whether some file was read through the page cache, because direct I/O was refused."""
        with self._lock:
            return any(copy.buffered for copy in self._copies)

    @property
    def queued_parts(self) -> int:
        """Parts that no thread has taken yet."""
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
        with self._work:
            self._closing = True
            self._demand.clear()
            self._prefetch.clear()
            self._work.notify_all()
        deadline = time.perf_counter() + CLOSE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.perf_counter()))
        if any(thread.is_alive() for thread in self._threads):
            log.warning("the drive does not answer; its reads are left behind")
            return
        for copy in self._copies:
            copy.retired += copy.files.values()
            copy.files.clear()
        self._close_retired()

    # -- the readers' side -------------------------------------------------------------------

    def _enqueue(self, read: Read, queue: deque[_Part]) -> None:
        begin = read.extent.offset - read.skip
        span = read.skip + read.extent.nbytes
        total = align_up(span)
        if len(read.buffer) < total:
            raise AssertionError(f"{read.what}: {total} bytes do not fit a buffer of {len(read.buffer)}")
        self._open_reads += 1
        for start in range(0, total, self._part_nbytes):
            nbytes = min(self._part_nbytes, total - start)
            read._parts_left += 1
            queue.append(_Part(read, begin + start, start, nbytes, min(nbytes, span - start)))

    def _run(self) -> None:
        while True:
            with self._work:
                while not (self._demand or self._prefetch or self._closing):
                    self._work.wait()
                if self._closing:
                    return
                part = self._demand.popleft() if self._demand else self._prefetch.popleft()
                read = part.read
                read.started = True
                if self._active == 0:
                    self._busy_since = time.perf_counter()
                self._active += 1
                skip = read.error is not None
            error = None if skip else self._perform(part)
            with self._work:
                self._active -= 1
                if self._active == 0:
                    self.counters.busy_s += time.perf_counter() - self._busy_since
                    self._close_retired()
                    self._quiet.notify_all()
                read.error = read.error or error
                read._parts_left -= 1
                if read._parts_left == 0:
                    if read.error is None:
                        self.counters.reads += 1
                        self.counters.bytes_read += read.extent.nbytes
                    self._done.put(read)

    def _perform(self, part: _Part) -> DiskError | None:
        """Read one part, from another copy or again if it fails; the error if it cannot be had."""
        fault = "no attempt was made"
        copy: _Copy | None = None
        for attempt in range(ATTEMPTS):
            copy = self._choose(avoid=copy)
            path = part.read.extent.path
            if copy.root is not None:
                path = copy.root / path.name
            try:
                self._read_part(copy, path, part)
                return None
            except OSError as error:
                fault = f"{error.strerror or error} ({path})"
                self._forget(copy, path)
                if error.errno not in _TRANSIENT and len(self._copies) == 1:
                    break
            except EOFError as error:
                fault = f"{error} ({path})"
            finally:
                with self._lock:
                    copy.outstanding -= 1
            if attempt + 1 < ATTEMPTS:
                with self._lock:
                    self.counters.retries += 1
                time.sleep(self._backoff_s * 2**attempt)
        extent = part.read.extent
        store = quote(str(extent.path.parent))
        return DiskError(
            f"{extent.path}: {part.read.what} ({extent.nbytes} bytes at offset {extent.offset}) cannot be read at "
            f"offset {part.offset}: {fault}; check the drive, then run `expertpager verify {store}`"
        )

    def _choose(self, avoid: _Copy | None) -> _Copy:
        """The copy with the shortest queue, another than the one that has just failed if there is one."""
        with self._lock:
            others = [copy for copy in self._copies if copy is not avoid]
            copy = min(others or self._copies, key=lambda candidate: candidate.outstanding)
            copy.outstanding += 1
            return copy

    def _read_part(self, copy: _Copy, path: Path, part: _Part) -> None:
        fd = self._descriptor(copy, path)
        done = 0
        while done < part.needed:
            at = part.start + done
            try:
                count = self._system.read(fd, part.read.buffer[at : part.start + part.nbytes], part.offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or path in copy.buffered:
                    raise
                fd = self._fall_back(copy, path)
                continue
            if done + count >= part.needed:
                return
            # A short read: go on at the last whole page, which direct I/O can address.
            progress = count // PAGE * PAGE
            if progress == 0:
                raise EOFError(f"only {done + count} of {part.needed} bytes arrived")
            done += progress
            with self._lock:
                self.counters.retries += 1

    def _descriptor(self, copy: _Copy, path: Path) -> int:
        with self._lock:
            fd = copy.files.get(path)
            if fd is None:
                try:
                    fd = self._system.open(path, path not in copy.buffered)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    self._announce(copy, path)
                    fd = self._system.open(path, False)
                copy.files[path] = fd
            return fd

    def _fall_back(self, copy: _Copy, path: Path) -> int:
        with self._lock:
            if path not in copy.buffered:
                self._announce(copy, path)
                if path in copy.files:
                    copy.retired.append(copy.files.pop(path))
            if path not in copy.files:
                copy.files[path] = self._system.open(path, False)
            return copy.files[path]

    def _close_retired(self) -> None:
        for copy in self._copies:
            while copy.retired:
                self._system.close(copy.retired.pop())

    def _forget(self, copy: _Copy, path: Path) -> None:
        """Open `path` anew next time: a drive that was away for a while has other descriptors when it is back."""
        with self._lock:
            if path in copy.files:
                copy.retired.append(copy.files.pop(path))

    def _announce(self, copy: _Copy, path: Path) -> None:
        if not copy.buffered:
            log.warning("%s: direct I/O is refused here; reading through the page cache, which is slower", path.parent)
        copy.buffered.add(path)
