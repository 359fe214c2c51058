"""Lists of slots on their way to the device: which slot computes which position of a layer.

Owns a few page-locked buffers and their counterparts on the device, used in turn. Must not know what slots
hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload.tiers.device import Device, Event

BUFFERS = 16
"""Sets of lists under way at a time. It also bounds how far copies of experts run ahead of computation."""


@dataclass
class _Buffer:
    host: Tensor
    values: NDArray[np.int32]
    """The same memory."""
    device: Tensor
    used: Event | None = None


class SlotLists:
    """Lists of up to `positions` int32, several at once where they are short: `entries` int32 in all."""

    def __init__(self, device: Device, positions: int, experts: int, entries: int = 0) -> None:
        self._device = device
        self.entries = max(positions, entries)
        host = device.pinned((BUFFERS, self.entries), torch.int32)
        there = device.empty((BUFFERS, self.entries), torch.int32)
        self._buffers = [_Buffer(host[n], host[n].numpy(), there[n]) for n in range(BUFFERS)]
        self._last = 0
        self._slot_of = np.full(experts, -1, np.int32)

    def send(self, groups: Sequence[Sequence[tuple[int, int]]], flat: NDArray[np.int64]) -> Tensor:
        """For every group of (expert, slot) a list: for every position the slot of its expert, -1 if it is in no pair.

        int32 [groups, positions] on the device, queued on the compute stream; valid until the next call of `free`.
        """
        self._last = (self._last + 1) % BUFFERS
        buffer = self._buffers[self._last]
        if buffer.used is not None:
            buffer.used.wait()
        count, slot_of = len(flat), self._slot_of
        for row, experts in enumerate(groups):
            for expert, slot in experts:
                slot_of[expert] = slot
            np.take(slot_of, flat, out=buffer.values[row * count : (row + 1) * count])
            for expert, _ in experts:
                slot_of[expert] = -1
        there = buffer.device[: len(groups) * count]
        self._device.compute.copy(there, buffer.host[: len(groups) * count])
        return there.view(len(groups), count)

    def free(self, used: Event) -> None:
        """Nothing behind `used` on the compute stream reads the lists sent last."""
        self._buffers[self._last].used = used

    def abandon(self) -> None:
        """The device has been waited for: all buffers are free."""
        for buffer in self._buffers:
            buffer.used = None
