"""The copies of a store's files: which one is read next, and through which descriptor.

Owns file handles and the choice between drives. Must not know queues, threads or what the bytes mean.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass, field
from errno import EINVAL
from pathlib import Path
from typing import Protocol

from offload.tiers.aio import KernelReads, needs_no_caller

log = logging.getLogger("expertpager")


class FileSystem(Protocol):
    """The system calls used here; tests put a slow, reordering, failing one in their place."""

    def open(self, path: Path, direct: bool) -> int:
        """A descriptor for reading. OSError EINVAL if direct I/O is refused."""

    def read(self, fd: int, buffer: memoryview, offset: int) -> int:
        """Bytes read into `buffer`, which may be fewer than it holds."""

    def close(self, fd: int) -> None:
        """Give the descriptor back."""

    def kernel_reads(self, depth: int) -> KernelReads | None:
        """Reads that need no thread; None where the system has none."""

    def suits_kernel_reads(self, fd: int) -> bool:
        """Whether `kernel_reads` read this file without stopping the one who submits."""


class Posix:
    """The real system calls."""

    def open(self, path: Path, direct: bool) -> int:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | (getattr(os, "O_DIRECT", 0) if direct else 0))

    def read(self, fd: int, buffer: memoryview, offset: int) -> int:
        return os.preadv(fd, [buffer], offset)

    def close(self, fd: int) -> None:
        os.close(fd)

    def kernel_reads(self, depth: int) -> KernelReads | None:
        try:
            return KernelReads(depth)
        except OSError as error:
            log.debug("reads go through threads: %s", error)
            return None

    def suits_kernel_reads(self, fd: int) -> bool:
        return needs_no_caller(fd)


@dataclass(frozen=True)
class Descriptor:
    """An open file."""

    fd: int
    kernel: bool
    """Whether the kernel reads it by itself."""


@dataclass(eq=False)
class Copy:
    """One copy of the store's files and the load on its drive. `root` is None for the files named by the extents."""

    root: Path | None
    outstanding: int = 0
    files: dict[Path, Descriptor] = field(default_factory=dict)
    buffered: set[Path] = field(default_factory=set)
    retired: list[int] = field(default_factory=list)
    """Descriptors that another thread may still be reading from."""

    def path(self, path: Path) -> Path:
        """Where the file at `path` of the store lies in this copy."""
        return path if self.root is None else self.root / path.name


class Copies:
    """The files of a store, and of its mirror if there is one. Every method may be called from any thread."""

    def __init__(self, mirror: Path | None, system: FileSystem) -> None:
        self._system = system
        self._copies = [Copy(None)] + ([Copy(Path(mirror))] if mirror else [])
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._copies)

    @property
    def buffered(self) -> bool:
        """Whether some file was read through the page cache, because direct I/O was refused."""
        with self._lock:
            return any(copy.buffered for copy in self._copies)

    def choose(self, avoid: Copy | None = None) -> Copy:
        """The copy with the shortest queue, another than `avoid` if there is one; `done` ends the read from it."""
        with self._lock:
            copy = self._copies[0]
            if len(self._copies) > 1:
                others = [copy for copy in self._copies if copy is not avoid]
                copy = min(others, key=lambda candidate: candidate.outstanding)
            copy.outstanding += 1
            return copy

    def done(self, copy: Copy) -> None:
        """A read from `copy` has ended."""
        with self._lock:
            copy.outstanding -= 1

    def all_done(self) -> None:
        """Nothing is being read."""
        with self._lock:
            for copy in self._copies:
                copy.outstanding = 0
        self.close_retired()

    def descriptor(self, copy: Copy, path: Path) -> Descriptor:
        """The open file; through the page cache, which is announced, where direct I/O is refused. Raises OSError."""
        with self._lock:
            found = copy.files.get(path)
            if found is None:
                try:
                    found = self._open(path, path not in copy.buffered)
                except OSError as error:
                    if error.errno != EINVAL:
                        raise
                    self._announce(copy, path)
                    found = self._open(path, False)
                copy.files[path] = found
            return found

    def fall_back(self, copy: Copy, path: Path) -> Descriptor:
        """Direct reads of `path` are refused: the file through the page cache."""
        with self._lock:
            if path not in copy.buffered:
                self._announce(copy, path)
                if path in copy.files:
                    copy.retired.append(copy.files.pop(path).fd)
            if path not in copy.files:
                copy.files[path] = self._open(path, False)
            return copy.files[path]

    def forget(self, copy: Copy, path: Path) -> None:
        """Open `path` anew next time: a drive that was away for a while has other descriptors when it is back."""
        with self._lock:
            if path in copy.files:
                copy.retired.append(copy.files.pop(path).fd)

    def close_retired(self) -> None:
        """Nothing is being read: descriptors nobody will use again can go."""
        with self._lock:
            for copy in self._copies:
                while copy.retired:
                    self._system.close(copy.retired.pop())

    def close(self) -> None:
        """Give back every descriptor."""
        with self._lock:
            for copy in self._copies:
                copy.retired += [file.fd for file in copy.files.values()]
                copy.files.clear()
        self.close_retired()

    def _open(self, path: Path, direct: bool) -> Descriptor:
        fd = self._system.open(path, direct)
        return Descriptor(fd, direct and self._system.suits_kernel_reads(fd))

    def _announce(self, copy: Copy, path: Path) -> None:
        if not copy.buffered:
            log.warning("%s: direct I/O is refused here; reading through the page cache, which is slower", path.parent)
        copy.buffered.add(path)
