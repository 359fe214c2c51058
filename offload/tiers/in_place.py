"""Experts that the processor computes in their RAM slots, for a layer whose sum is on a device.

Owns the way of the inputs to the host and of the outputs back, through page-locked memory. Must not decide
which experts these are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload.cache.split import SplitModel
from offload.kernels import Kernels
from offload.tiers.device import Device, Event
from offload.tiers.ram import RamTier

MOST_TOKENS = 4
"""Longest pass of which the processor computes a part: beyond it, matrix units win over any link."""


class InPlace:
    """The processor's side of a layer: `begin`, then `compute` for experts as their bytes are there."""

    def __init__(self, device: Device, kernels: Kernels, ram: RamTier, hidden_size: int, model: SplitModel) -> None:
        top_k = ram.shape.top_k
        self.model = model
        self.experts = 0
        """How many were computed here so far."""
        self._device = device
        self._kernels = kernels
        self._ram = ram
        self._k = top_k
        self._x = device.pinned((MOST_TOKENS, hidden_size), torch.float32)
        self._partial = device.pinned((MOST_TOKENS * top_k, hidden_size), torch.float32)
        self._arrived: Event | None = None

    def begin(self, x: Tensor) -> None:
        """Queue the way of x [T, H] to the host, before other work of the layer is queued."""
        self._device.compute.copy(self._x[: x.shape[0]], x)
        self._arrived = self._device.compute.record()

    def compute(self, there: Sequence[tuple[int, int]], flat: NDArray[np.int64], partial: Tensor) -> None:
        """Outputs of (expert, RAM slot) pairs for their positions in `flat`, into rows of `partial` on the device."""
        assert self._arrived is not None
        self._arrived.wait()
        wave = [(self._ram.weights(slot), torch.from_numpy(np.flatnonzero(flat == expert))) for expert, slot in there]
        begun = time.perf_counter()
        outputs = self._partial[: len(flat)]  # kernels check that there is a row for every position and no more
        self._kernels.experts(self._x[: len(flat) // self._k], wave, self._k, outputs)
        self.model.observed("cpu", time.perf_counter() - begun, len(wave))
        self.experts += len(wave)
        for _, positions in wave:
            for position in positions.tolist():
                # On the compute stream, in order before the sum; the next layer's ids come after it.
                self._device.compute.copy(partial[position], outputs[position])
