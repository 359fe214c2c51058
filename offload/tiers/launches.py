"""The kernels of a layer over the slots of one device: what they are told about positions, and their start.

Owns the way in which positions go with slots: by a list for every launch where a pass is short, grouped by
expert where it is long. Must not know when the bytes of an expert are in its slot, nor why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from offload.kernels.device import FEW_TOKENS, DeviceKernels, ExpertSlab, Groups
from offload.tiers.device import Device, Event
from offload.tiers.staging import GroupTables, SlotLists


@dataclass
class LayerJob:
    """The routed part of one layer of one forward pass."""

    layer: int
    x: Tensor  # [T, H] on the device
    flat: NDArray[np.int64]
    """The expert of every position, [T * K]."""
    partial: Tensor  # [T * K, H] on the device
    grouped: bool = False
    """Whether positions have been ordered by expert."""
    present: bool = False
    """Whether the device computes those experts by itself that its table of slots has."""
    inputs: Tensor | None = None
    """`DeviceKernels.group_input` of x, once a kernel has needed it."""

    @property
    def few(self) -> bool:
        """Whether the pass is short, decoding or nearly so."""
        return self.x.shape[0] <= FEW_TOKENS


class SlotLaunches:
    """Starts kernels on `slab` for passes of up to `max_tokens` tokens. Memory is taken here, at load."""

    def __init__(
        self, device: Device, kernels: DeviceKernels, slab: ExpertSlab, max_tokens: int, top_k: int, experts: int
    ) -> None:
        self._compute = device.compute
        self._kernels = kernels
        self._slab = slab
        self._bytes = slab.data.unbind()  # of every slot: a view takes as long to make as a copy to queue
        self._lists = SlotLists(device, min(max_tokens, FEW_TOKENS) * top_k, experts)
        self._tables = GroupTables(device, max_tokens * top_k, experts)
        self._sent: dict[int, Tensor] = {}

    def announce(self, job: LayerJob, launches: Sequence[Sequence[tuple[int, int]]]) -> None:
        """A wave will launch these groups of (expert, slot) pairs: for a short pass all lists travel in one copy."""
        if job.few and launches and len(job.flat):
            lists = self._lists.send(launches, job.flat)
            self._sent = {pairs[0][0]: sent for pairs, sent in zip(launches, lists, strict=True)}

    def hits(self, job: LayerJob, pairs: Sequence[tuple[int, int]]) -> None:
        """`launch` for experts that the table of slots had when the device came to this layer."""
        if not job.present:
            self.launch(job, pairs)
        elif pairs:  # queued before anybody knew what it would read
            self._compute.launch(_nothing, reads=[self._bytes[slot] for _, slot in pairs], writes=[job.partial])

    def launch(self, job: LayerJob, pairs: Sequence[tuple[int, int]]) -> None:
        """Queue the kernels of (expert, slot) pairs, announced like this if the pass is short, for their positions."""
        if not pairs or not len(job.flat):
            return
        if job.few:
            work = partial(self._kernels.slot_experts, self._slab, job.x, self._sent[pairs[0][0]], job.partial)
        else:
            if not job.grouped:
                self._tables.begin(job.flat, self._kernels.tile_rows(self._slab.layout, job.x.shape[0]))
                job.grouped = True
            work = partial(_compute_groups, self._kernels, self._slab, job, self._tables.send(pairs))
        self._compute.launch(work, reads=[self._bytes[slot] for _, slot in pairs], writes=[job.partial])
        if not job.few:
            self._tables.free(self._compute.record())

    def end(self) -> Event:
        """The point behind all kernels of the wave."""
        used = self._compute.record()
        if self._sent:
            self._lists.free(used)
            self._sent = {}
        return used

    def abandon(self) -> None:
        """A step broke off, and the device has been waited for."""
        self._sent = {}
        self._lists.abandon()
        self._tables.abandon()


def _nothing() -> None:
    pass


def _compute_groups(kernels: DeviceKernels, slab: ExpertSlab, job: LayerJob, groups: Groups) -> None:
    if job.inputs is None:
        job.inputs = kernels.group_input(slab.layout, job.x)
    kernels.group_experts(slab, job.inputs, groups, job.partial)
