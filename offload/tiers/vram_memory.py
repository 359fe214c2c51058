"""Memory of the VRAM tier on one device: slots for experts, and room for the outputs of a layer.

Owns the allocation, the size of a slot, and which slots hold the outputs of long passes. Must not know which expert
is in which slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offload.kernels.device import ExpertSlab
from offload.store.layout import ExpertLayout
from offload.tiers.device import Device
from offload.types import align_up, ceil_div

ALIGNMENT = 256
"""Slots begin at multiples of it, so that every load of a warp is aligned."""

SHORT = 8
"""Longest pass whose outputs have memory of their own; longer ones may borrow slots for it."""


def slot_nbytes(layout: ExpertLayout) -> int:
    """Device memory of one slot."""
    return align_up(layout.stride, ALIGNMENT)


def lent_slots(layout: ExpertLayout, max_tokens: int, top_k: int) -> int:
    """Slots that hold the outputs of a pass over `max_tokens` tokens."""
    return ceil_div(max_tokens * top_k * layout.hidden_size * torch.float32.itemsize, slot_nbytes(layout))


class VramMemory:
    """`slots` slots and the outputs of passes of up to `max_tokens` tokens, taken here, at load.

    `lend`: passes of more than SHORT tokens borrow slots for their outputs, so that decoding has more of them.
    """

    def __init__(
        self, device: Device, layout: ExpertLayout, slots: int, *, max_tokens: int, top_k: int, lend: bool
    ) -> None:
        self.slab = ExpertSlab(layout, device.empty((slots, slot_nbytes(layout)), torch.uint8))
        self.targets = self.slab.data[:, : layout.stride].unbind()
        """The bytes of the expert in every slot."""
        own = (SHORT if lend else max_tokens) * top_k
        self._own = device.empty((own, layout.hidden_size), torch.float32)
        device.call(self._own.zero_)  # recordings are run before anything has been computed
        lent = lent_slots(layout, max_tokens, top_k) if lend else 0
        assert lent + 2 <= slots, "enough slots to work with are left"
        self.lendable = range(slots - lent, slots)
        self.borrowed = False
        """Whether the slots `lendable` hold outputs now, instead of experts."""

    def lends(self, tokens: int) -> bool:
        """Whether a pass over so many tokens has its outputs where slots are otherwise."""
        return bool(self.lendable) and tokens > SHORT

    def outputs(self, positions: int) -> Tensor:
        """Where the outputs of a layer of the pass under way go, float32 [positions, H]."""
        if not self.borrowed:
            return self._own[:positions]
        room = self.slab.data[self.lendable.start :].view(-1).view(torch.float32)
        hidden = self._own.shape[1]
        return room[: positions * hidden].view(positions, hidden)
