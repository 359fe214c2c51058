"""What kernels are told about a layer on its way to the device: which slot computes which of its positions.

Owns page-locked buffers and their counterparts on the device, used in turn, and the device's own table of slots.
Must not know when the bytes of an expert are in its slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload.kernels.device import LEAST_TILE, Groups
from offload.tiers.device import Device, Event
from offload.types import align_up, ceil_div

BUFFERS = 16
"""Lists under way at a time. It also bounds how far copies of experts run ahead of computation."""

ORDERS = 2
"""Layers whose order of positions is kept at a time."""


def staging_nbytes(tokens: int, short: int, top_k: int, experts: int) -> int:
    """Device memory that `SlotLists` take for passes of up to `short` tokens and `GroupTables` for longer ones."""
    few, many = min(tokens, short) * top_k, tokens * top_k
    return 4 * (BUFFERS * (few * _stride(few) + 3 * _most_tiles(many, experts)) + ORDERS * _stride(many))


@dataclass
class _Buffer:
    host: Tensor
    values: NDArray[np.int32]
    """The same memory."""
    device: Tensor
    used: Event | None = None


class _Ring:
    """`count` buffers of `entries` int32, taken one after the other."""

    def __init__(self, device: Device, count: int, entries: int) -> None:
        self._stream = device.compute
        entries = _stride(entries)
        host, there = device.pinned((count, entries), torch.int32), device.empty((count, entries), torch.int32)
        self._buffers = [_Buffer(host[n], host[n].numpy(), there[n]) for n in range(count)]
        self._at = 0

    def take(self) -> NDArray[np.int32]:
        """Room in the next buffer, whose turn has come again only when its last use is over."""
        self._at = (self._at + 1) % len(self._buffers)
        buffer = self._buffers[self._at]
        if buffer.used is not None:
            buffer.used.wait()
        return buffer.values

    def send(self, entries: int) -> Tensor:
        """Queue the way of what was written there to the device."""
        buffer = self._buffers[self._at]
        there = buffer.device[:entries]
        self._stream.copy(there, buffer.host[:entries])
        return there

    def free(self, used: Event) -> None:
        """Nothing behind `used` on the compute stream reads what was sent last."""
        self._buffers[self._at].used = used

    def abandon(self) -> None:
        """The device has been waited for: all buffers are free."""
        for buffer in self._buffers:
            buffer.used = None


class SlotLists:
    """For passes of up to `positions` positions: lists, as many at once as there are positions."""

    def __init__(self, device: Device, positions: int, experts: int) -> None:
        self._ring = _Ring(device, BUFFERS, positions * _stride(positions))
        self._slot_of = np.full(experts, -1, np.int32)
        self.free = self._ring.free
        self.abandon = self._ring.abandon

    def send(self, groups: Sequence[Sequence[tuple[int, int]]], flat: NDArray[np.int64]) -> list[Tensor]:
        """For every group of (expert, slot) a list: for every position the slot of its expert, -1 if it is in no pair.

        int32 [positions] on the device, queued on the compute stream; valid until the next call of `free`.
        """
        values, count, slot_of = self._ring.take(), len(flat), self._slot_of
        stride = _stride(count)
        for row, experts in enumerate(groups):
            for expert, slot in experts:
                slot_of[expert] = slot
            np.take(slot_of, flat, out=values[row * stride : row * stride + count])
            for expert, _ in experts:
                slot_of[expert] = -1
        whole = self._ring.send((len(groups) - 1) * stride + count)
        if len(groups) == 1:
            return [whole]
        return [whole[at : at + count] for at in range(0, len(groups) * stride, stride)]


class SlotTable:
    """On the device, for every layer: the slot of every expert, -1 for those whose bytes are not there."""

    def __init__(self, device: Device, layers: int, experts: int) -> None:
        table = device.empty((layers, experts), torch.int32)
        device.call(lambda: table.fill_(-1))
        self._rows = table.unbind()
        self._send = [device.sender(row) for row in self._rows]
        self._sent: list[NDArray[np.int32] | None] = [None] * layers

    def row(self, layer: int) -> Tensor:
        """int32 [experts] on the device: what was shown last by the time that work queued there runs."""
        return self._rows[layer]

    def show(self, layer: int, slots: NDArray[np.int32]) -> None:
        """Queue `slots` [experts] on their way to the row of `layer`, unless that is what it holds."""
        sent = self._sent[layer]
        if sent is not None and np.array_equal(sent, slots):
            return
        sent = self._sent[layer] = slots.copy()
        self._send[layer](torch.from_numpy(sent))

    def abandon(self) -> None:
        """A step broke off, and the device has been waited for; rows under way may not have arrived."""
        self._sent = [None] * len(self._sent)


class GroupTables:
    """For passes of up to `positions` positions: their order by expert, sent once per layer, and tables of tiles."""

    def __init__(self, device: Device, positions: int, experts: int) -> None:
        self._experts = experts
        self._sortable = np.int16 if experts <= 1 << 15 else np.int32  # numpy sorts two bytes in linear time
        self._orders = _Ring(device, ORDERS, positions)
        self._tables = _Ring(device, BUFFERS, 3 * _most_tiles(positions, experts))
        self._order: Tensor
        self._begin: NDArray[np.int64]
        self._tile = LEAST_TILE

    def begin(self, flat: NDArray[np.int64], tile: int) -> None:
        """A layer, with the expert of every position, in tiles of up to `tile` rows."""
        assert tile >= LEAST_TILE, "tables have room for as many tiles as that makes"
        self._tile = tile
        values = self._orders.take()
        values[: len(flat)] = np.argsort(flat.astype(self._sortable), kind="stable")
        self._order = self._orders.send(len(flat))
        self._begin = np.zeros(self._experts + 1, np.int64)
        np.cumsum(np.bincount(flat, minlength=self._experts), out=self._begin[1:])

    def send(self, experts: Sequence[tuple[int, int]]) -> Groups:
        """The tiles of (expert, slot) pairs, queued on the compute stream; valid until the next call of `free`."""
        pairs = np.asarray(experts, np.int64)
        first, end = self._begin[pairs[:, 0]], self._begin[pairs[:, 0] + 1]
        tiles = -(-(end - first) // self._tile)
        count = int(tiles.sum())
        behind = np.cumsum(tiles)
        number = np.arange(count) - np.repeat(behind - tiles, tiles)  # of the tile within its expert
        stride = _stride(count)
        table = self._tables.take()[: 3 * stride].reshape(3, stride)[:, :count]
        table[0] = np.repeat(pairs[:, 1], tiles)
        table[1] = np.repeat(first, tiles) + number * self._tile
        table[2] = np.repeat(end, tiles)
        slot, start, stop = self._tables.send(3 * stride).view(3, stride)[:, :count].unbind()
        return Groups(self._order, slot, start, stop, count)

    def free(self, used: Event) -> None:
        """Nothing behind `used` on the compute stream reads what was sent last."""
        self._tables.free(used)
        self._orders.free(used)

    def abandon(self) -> None:
        """The device has been waited for: all buffers are free."""
        self._tables.abandon()
        self._orders.abandon()


def _most_tiles(positions: int, experts: int) -> int:
    """Tiles of a whole layer at most: every expert may have one that is not full, and none is empty."""
    return _stride(min(positions, ceil_div(positions, LEAST_TILE) + experts))


def _stride(positions: int) -> int:
    """Entries from one list to the next: kernels are compiled anew for lists that are aligned otherwise."""
    return align_up(positions, 4)
