"""One extent on its way from the drive, and the parts it is read in.

Owns what is known of a read while it waits, is under way and has ended. Must not know who carries it out.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from offload.errors import DiskError
from offload.types import PAGE, Extent, align_up


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
    parts_left: int = 0

    @property
    def skip(self) -> int:
        """Offset of the extent's first byte in `buffer`."""
        return self.extent.offset % PAGE

    @property
    def address(self) -> int:
        """Where `buffer` lies in memory."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))


class Part(NamedTuple):
    """What one request to the drive asks for."""

    read: Read
    offset: int  # in the file, a multiple of PAGE
    start: int  # in the buffer, a multiple of PAGE
    nbytes: int  # a multiple of PAGE
    needed: int  # bytes of it that must arrive; the rest may lie beyond the end of the file


def cut(read: Read, part_nbytes: int) -> Iterator[Part]:
    """The parts of `read`, none larger than `part_nbytes`, a multiple of PAGE; counted in `read.parts_left`."""
    begin = read.extent.offset - read.skip
    span = read.skip + read.extent.nbytes
    total = align_up(span)
    if len(read.buffer) < total:
        raise AssertionError(f"{read.what}: {total} bytes do not fit a buffer of {len(read.buffer)}")
    for start in range(0, total, part_nbytes):
        nbytes = min(part_nbytes, total - start)
        read.parts_left += 1
        yield Part(read, begin + start, start, nbytes, min(nbytes, span - start))
