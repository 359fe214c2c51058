"""Direct I/O for files that are read or written once: hundreds of gigabytes that should push nothing out of the page
cache nor cost a copy through it.

Owns opening, and memory that direct I/O accepts. Must not know what the bytes mean.
"""

from __future__ import annotations

import errno
import mmap
import os
import weakref
from collections import deque
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offload.types import align_up

_ALLOCATION = 32 << 20
"""Bytes of an allocation of HugePages: what is left of a huge page at its ends is a small part."""

_SMALL = 256 << 10
"""Bytes below which huge pages gain nothing: a model of small tensors would take more memory than it needs."""

_LINE = 64


def open_direct(path: Path, flags: int) -> int | None:
    """A descriptor for direct I/O, or None where the file system has none. Raises OSError for everything else.

    Offsets, lengths and addresses must be multiples of a page.
    """
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC, 0o666)
    except OSError as fault:
        if fault.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return None
        raise


def page_buffer(nbytes: int) -> memoryview:
    """Memory of at least `nbytes` bytes, in whole pages."""
    # Private, so that it may lie in huge pages: shared memory, the default of mmap, takes pages of 4 KiB on most
    # systems, each of which a direct read has to look up: it halves the speed of a fast drive. Advice only: a refusal
    # changes nothing.
    memory = mmap.mmap(-1, align_up(max(nbytes, 1)), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


class HugePages:
    """Memory for many tensors that stay, side by side in large allocations, so that all of it can lie in huge pages.

    Every small page costs an address translation, and the processor's prefetchers stop at its end. An allocation goes
    when the last buffer in it has gone. Not thread-safe.
    """

    def __init__(self) -> None:
        # Held by its tensors alone: whoever takes them from it may live longer than they do.
        self._memory: weakref.ref[NDArray[np.uint8]] | None = None
        self._used = 0

    def take(self, nbytes: int) -> bytearray | memoryview:
        """`nbytes` bytes, at least one, zeroed. What is small has memory of its own, the rest begins with a line."""
        nbytes = max(nbytes, 1)
        if nbytes < _SMALL:
            return bytearray(nbytes)
        if nbytes > _ALLOCATION // 2:
            return page_buffer(nbytes)[:nbytes]
        memory = None if self._memory is None else self._memory()
        if memory is None or self._used + nbytes > _ALLOCATION:
            memory = np.frombuffer(page_buffer(_ALLOCATION), dtype=np.uint8)
            self._memory, self._used = weakref.ref(memory), 0
        first, self._used = self._used, self._used + align_up(nbytes, _LINE)
        return memory.data[first : first + nbytes]


class PageArrays:
    """Arrays of bytes in whole pages whose memory is used again as soon as nothing looks into it any more.

    The kernel clears memory before it gives it out: for buffers of an expert's size that takes a tenth of the time of
    a conversion. Up to `keep` buffers lie ready. Thread-safe.
    """

    def __init__(self, keep: int = 4) -> None:
        # No lock: a finalizer may run anywhere, inside this class too, and a deque's own calls are atomic.
        self._free: deque[memoryview] = deque(maxlen=keep)

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """uint8 [nbytes rounded up to whole pages] of any content. Views of it keep it from being used again."""
        size = align_up(max(nbytes, 1))
        pages = self._fitting(size) or page_buffer(size)
        array = np.frombuffer(pages, dtype=np.uint8)
        weakref.finalize(array, self._free.append, pages).atexit = False
        return array[:size]

    def _fitting(self, size: int) -> memoryview | None:
        for _ in range(len(self._free)):
            try:
                pages = self._free.popleft()
            except IndexError:  # another thread was faster
                return None
            if size <= len(pages) <= 2 * size:
                return pages
            self._free.append(pages)
        return None
