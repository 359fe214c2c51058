"""Direct I/O for files that are read or written once: hundreds of gigabytes that should push nothing out of the page
cache nor cost a copy through it.

Owns opening, and memory that direct I/O accepts. Must not know what the bytes mean.
"""

from __future__ import annotations

import errno
import mmap
import os
from contextlib import suppress
from pathlib import Path

from offload.types import align_up


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
    # Private and in huge pages: shared memory, the default of mmap, takes a fault for every 4 KiB.
    memory = mmap.mmap(-1, align_up(max(nbytes, 1)), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)
