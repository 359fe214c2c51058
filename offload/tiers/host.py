"""Expert slots in host memory: one allocation, made and touched at load.

Owns the memory. Must not know which expert is in which slot.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

from offload.errors import BudgetError
from offload.types import PAGE, align_up, format_size


class SlotPool:
    """`slots` page-aligned slots of `nbytes` each (rounded up to pages), resident from the start."""

    def __init__(self, slots: int, nbytes: int) -> None:
        self.slots = slots
        self.stride = align_up(nbytes)
        total = slots * self.stride
        try:
            # Private, so that it may lie in huge pages: shared memory, the default of mmap, takes pages of 4 KiB on
            # most systems, each of which a direct read has to look up: it halves the speed of a fast drive. Advice
            # only: a refusal changes nothing.
            self._map = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):
                    self._map.madvise(mmap.MADV_HUGEPAGE)
        except (OSError, ValueError, OverflowError) as error:
            raise BudgetError(
                f"{slots} expert slots of {format_size(self.stride)} ({format_size(total)}) cannot be "
                f"allocated: {error}; give a smaller --ram"
            ) from None
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._view = memoryview(self._map)
        assert self.bytes.data_ptr() % PAGE == 0, "anonymous memory is page aligned"
        self.bytes[::PAGE] = 0  # touch every page now: nothing is allocated later

    @property
    def nbytes(self) -> int:
        """Bytes of the whole pool."""
        return self.slots * self.stride

    def tensor(self, slot: int) -> Tensor:
        """The slot's bytes, uint8 [stride]."""
        return self.bytes[slot * self.stride : (slot + 1) * self.stride]

    def buffer(self, slot: int) -> memoryview:
        """The slot's bytes as a writable buffer for reads."""
        return self._view[slot * self.stride : (slot + 1) * self.stride]
