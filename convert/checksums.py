"""Checksums of byte ranges of files, read at the speed of the drive.

Owns direct reads for checking: what is compared is what the drive holds, not what the page cache remembers, and
checking a store of hundreds of gigabytes pushes nothing else out of memory. Where a file system refuses direct I/O,
the range is dropped from the page cache first. Must not know stores.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import xxhash

from offload.store.direct import open_direct, page_buffer
from offload.types import PAGE, align_up

_CHUNK = 8 << 20


class RangeReader:
    """Computes checksums of ranges; safe to use from several threads, each with a buffer of its own."""

    def __init__(self) -> None:
        self._files: dict[tuple[Path, bool], int] = {}
        self._lock = threading.Lock()
        self._local = threading.local()

    def checksum(self, path: Path, offset: int, nbytes: int) -> str:
        """XXH3-128 of `nbytes` bytes of `path` from `offset`; of fewer when the file ends early. Raises OSError."""
        try:
            return self._checksum(self._open(path), offset, nbytes)
        except OSError as fault:
            if fault.errno != errno.EINVAL:
                raise
            # Some file systems refuse direct I/O only when something is read.
            return self._checksum(self._open(path, direct=False), offset, nbytes)

    def _checksum(self, fd: int, offset: int, nbytes: int) -> str:
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
        digest = xxhash.xxh3_128()
        buffer = self._buffer()
        at, end = offset // PAGE * PAGE, offset + nbytes
        while at < end:
            count = os.preadv(fd, [buffer[: min(_CHUNK, align_up(end - at))]], at)
            digest.update(buffer[max(0, offset - at) : min(count, end - at)])
            at += count
            if count % PAGE or not count:
                break  # the end of the file
        return digest.hexdigest()

    def close(self) -> None:
        """Give the files back."""
        with self._lock:
            for fd in self._files.values():
                os.close(fd)
            self._files.clear()

    def __enter__(self) -> RangeReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _buffer(self) -> memoryview:
        if not hasattr(self._local, "buffer"):
            self._local.buffer = page_buffer(_CHUNK)
        buffer: memoryview = self._local.buffer
        return buffer

    def _open(self, path: Path, direct: bool = True) -> int:
        key = (path, direct)
        with self._lock:
            if key not in self._files:
                fd = open_direct(path, os.O_RDONLY) if direct else None
                self._files[key] = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if fd is None else fd
            return self._files[key]
