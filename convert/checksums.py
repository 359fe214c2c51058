"""Checksums of byte ranges of files, read at the speed of the drive.

Owns direct reads for checking: what is compared is what the drive holds, not what the page cache remembers, and
checking a store of hundreds of gigabytes pushes nothing else out of memory. Where a file system refuses direct I/O,
the range is dropped from the page cache first. Must not know stores.
"""

from __future__ import annotations

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
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._local = threading.local()

    def checksum(self, path: Path, offset: int, nbytes: int) -> str:
        """XXH3-128 of `nbytes` bytes of `path` from `offset`; of fewer when the file ends early. Raises OSError."""
        digest = xxhash.xxh3_128()
        buffer = self._buffer()
        at, end = offset // PAGE * PAGE, offset + nbytes
        fd = self._open(path, offset, nbytes)
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

    def _open(self, path: Path, offset: int, nbytes: int) -> int:
        with self._lock:
            if path not in self._files:
                direct = open_direct(path, os.O_RDONLY)
                self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if direct is None else direct
            fd = self._files[path]
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
        return fd
