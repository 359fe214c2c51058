"""Expert slots in host memory: one allocation, made and touched at load, and the tensors of what lies there.

Owns the memory. Must not know which expert is in which slot.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from offload.errors import BudgetError
from offload.store.direct import page_buffer
from offload.store.layout import ExpertLayout, ExpertWeights
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


class SlotWeights:
    """The expert in each slot as views; made once per slot where its bytes always lie alike."""

    def __init__(self, layout: ExpertLayout, pool: SlotPool) -> None:
        self._layout = layout
        self._pool = pool
        self._views: list[ExpertWeights | None] = [None] * pool.slots
        self._skips = [0] * pool.slots
        first = pool.bytes.data_ptr()
        self.addresses = np.arange(pool.slots, dtype=np.uint64) * np.uint64(pool.stride) + np.uint64(first)
        """Of the first byte of the expert in each slot."""
        self._alignment = max(field.dtype.itemsize for field in layout.fields)
        self._fields_aligned = all(field.offset % field.dtype.itemsize == 0 for field in layout.fields)

    def filling(self, slot: int, skip: int) -> None:
        """An expert is being read into `slot`, its first byte at `skip`."""
        # A view of misaligned elements would be a copy, which goes stale when the slot is filled.
        if skip != self._skips[slot] or skip % self._alignment or not self._fields_aligned:
            self._views[slot] = None
            self.addresses[slot] = self._pool.tensor(slot).data_ptr() + skip
            self._skips[slot] = skip

    def __getitem__(self, slot: int) -> ExpertWeights:
        weights = self._views[slot]
        if weights is None:
            weights = self._layout.views(self._pool.tensor(slot)[self._skips[slot] :])
            self._views[slot] = weights
        return weights
