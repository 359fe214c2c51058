"""Lists of slots on their way to the device: which slot computes which position of a layer.

Owns a few page-locked buffers and their counterparts on the device, used in turn. Must not know what slots
hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload.tiers.device import Device, Event

BUFFERS = 16
"""Lists under way at a time. It also bounds how far copies of experts run ahead of computation."""


@dataclass
class _Buffer:
    host: Tensor
    device: Tensor
    used: Event | None = None


class SlotLists:
    """Lists of up to `positions` int32."""

    def __init__(self, device: Device, positions: int, experts: int) -> None:
        self._device = device
        host = device.pinned((BUFFERS, positions), torch.int32)
        there = device.empty((BUFFERS, positions), torch.int32)
        self._buffers = [_Buffer(host[n], there[n]) for n in range(BUFFERS)]
        self._next = 0
        self._slot_of = np.full(experts, -1, np.int32)

    @contextmanager
    def of(self, experts: Sequence[tuple[int, int]], flat: NDArray[np.int64]) -> Iterator[Tensor]:
        """For every position the slot of its expert, -1 if it is not among `experts` (expert, slot).

        Valid for what is launched within the context.
        """
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % BUFFERS
        if buffer.used is not None:
            buffer.used.wait()
        for expert, slot in experts:
            self._slot_of[expert] = slot
        count = len(flat)
        np.take(self._slot_of, flat, out=buffer.host[:count].numpy())
        for expert, _ in experts:
            self._slot_of[expert] = -1
        stream = self._device.compute
        stream.copy(buffer.device[:count], buffer.host[:count])
        yield buffer.device[:count]
        buffer.used = stream.record()

    def abandon(self) -> None:
        """The device has been waited for: all buffers are free."""
        for buffer in self._buffers:
            buffer.used = None
