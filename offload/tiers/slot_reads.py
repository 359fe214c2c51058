"""Experts on their way from the drive to slots of RAM.

Owns where an expert lies in the store and which read fills which slot. Must not know what is wanted, by whom, or
what a read that has ended means: residency and those who wait are told by the RAM tier.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from offload.cache.decisions import Load
from offload.config import ModelConfig
from offload.store.layout import ExpertLayout
from offload.tiers.disk import DiskReader
from offload.tiers.host import SlotPool, SlotWeights
from offload.tiers.reads import Read
from offload.types import PAGE, ExpertId, Extent, align_up


class ExpertStore(Protocol):
    """What the RAM tier needs of a store."""

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> ModelConfig: ...

    @property
    def layout(self) -> ExpertLayout: ...

    def locate(self, expert: ExpertId) -> Extent: ...


class SlotReads:
    """Reads of the experts of `store` into slots. Layers are MoE layers, counted from 0.

    Every read is noted before it is queued, by its slot, until `ended` or `cancel` takes it away.
    """

    def __init__(self, store: ExpertStore, reader: DiskReader, pool: SlotPool, weights: SlotWeights) -> None:
        self._store = store
        self._layers = store.config.moe_layers
        self._reader = reader
        self._pool = pool
        self._weights = weights
        self._under_way: dict[int, Read] = {}

    def __len__(self) -> int:
        return len(self._under_way)

    def demand(self, layer: int, loads: Sequence[Load]) -> None:
        """Begin reads that somebody waits for."""
        self._reader.submit([self._read(layer, load) for load in loads])

    def prefetch(self, layer: int, load: Load) -> None:
        """Begin a read that nobody waits for yet."""
        self._reader.prefetch(self._read(layer, load))

    def promote(self, slot: int) -> bool:
        """Somebody waits for the prefetch into `slot` now; False if it has ended."""
        if slot not in self._under_way:
            return False
        self._reader.promote(self._under_way[slot])
        return True

    def ended(self, wait: bool) -> Read | None:
        """The next read that has ended, well or not; None if there is none."""
        read = self._reader.completed(wait)
        if read is not None:
            del self._under_way[read.tag]
        return read

    def cancel(self, slot: int) -> bool:
        """Withdraw the prefetch into `slot`; False if it has begun or ended."""
        if not self._reader.cancel(self._under_way[slot]):
            return False
        del self._under_way[slot]
        return True

    def restored(self, slot: int, layer: int, expert: int) -> None:
        """A read into `slot` was withdrawn: the bytes of the expert it would have displaced are intact."""
        self._weights.filling(slot, self._locate(layer, expert).offset % PAGE)

    def abandon(self) -> None:
        """Drop all reads and wait for those that have begun."""
        self._reader.abandon()
        self._under_way.clear()

    def _read(self, layer: int, load: Load) -> Read:
        expert, slot, _ = load
        what = f"expert {expert} of layer {self._layers[layer]}"
        read = Read(self._locate(layer, expert), self._pool.buffer(slot), what, tag=slot)
        self._under_way[slot] = read
        self._weights.filling(slot, read.skip)
        return read

    def _locate(self, layer: int, expert: int) -> Extent:
        return self._store.locate(ExpertId(self._layers[layer], expert))


def slot_nbytes(store: ExpertStore) -> int:
    """Bytes of a slot: an expert with the pages around it, the same for every expert."""
    stride = store.layout.stride
    first = store.locate(ExpertId(store.config.moe_layers[0], 0)).offset
    if stride % PAGE == 0 and first % PAGE == 0:
        return stride
    return align_up(stride) + PAGE
