"""Expert slots in host memory: one allocation, made and touched at load.

Owns the memory. Must not know which expert is in which slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offload.errors import BudgetError
from offload.store.direct import page_buffer
from offload.types import PAGE, align_up, format_size


class SlotPool:
    """`slots` page-aligned slots of `nbytes` each (rounded up to pages), resident from the start."""

    def __init__(self, slots: int, nbytes: int) -> None:
        self.slots = slots
        self.stride = align_up(nbytes)
        total = slots * self.stride
        try:
            if total < 1:
                raise ValueError("there is nothing to allocate")
            self._view = page_buffer(total)
        except (OSError, ValueError, OverflowError) as error:
            raise BudgetError(
                f"{slots} expert slots of {format_size(self.stride)} ({format_size(total)}) cannot be "
                f"allocated: {error}; give a smaller --ram"
            ) from None
        self.bytes = torch.frombuffer(self._view, dtype=torch.uint8)
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
