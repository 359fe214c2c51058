"""Experts on their way from slots of RAM to the slots of one device.

Owns the copies that have been queued, the RAM slots they need until they are over, and how long they took. Must not
know who wants an expert, nor what becomes of it there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from offload.cache.split import SplitModel
from offload.tiers.device import Device, Event
from offload.tiers.ram import RamTier


@dataclass
class ExpertCopy:
    """An expert on its way from the RAM slot `source`, which is held until the copy is settled."""

    begin: Event
    end: Event
    source: int


class Link:
    """Copies of experts of RAM into the bytes `targets` of slots; `split`, if given, is told how long they take."""

    def __init__(self, device: Device, ram: RamTier, targets: Sequence[Tensor], split: SplitModel | None) -> None:
        self.copies = 0
        self.nbytes = 0
        self.busy_s = 0.0
        self._device = device
        self._ram = ram
        self._targets = targets
        self._stride = targets[0].shape[0]
        self._split = split
        self._demanded: deque[ExpertCopy] = deque()
        ram.on_stuck(self._give_back)

    def copy(self, source: int, slot: int, begin: Event | None = None) -> ExpertCopy:
        """Queue a copy that the caller is to `settle`, or to pass to `demand`.

        `begin`: the end of a copy queued right before this one, if there is any.
        """
        copies = self._device.copies
        self._ram.residency.hold(source)
        begin = begin or copies.record(timed=True)
        copies.copy(self._targets[slot], self._ram.weights(source).buffer[: self._stride])
        return ExpertCopy(begin, copies.record(timed=True), source)

    def copy_demanded(self, pairs: Sequence[tuple[int, int]]) -> list[ExpertCopy]:
        """Queue copies of (RAM slot, slot) pairs, one behind the other."""
        copies: list[ExpertCopy] = []
        for source, slot in pairs:
            copy = self.copy(source, slot, copies[-1].end if copies else None)
            self._demanded.append(copy)
            copies.append(copy)
        return copies

    def demand(self, copy: ExpertCopy) -> None:
        """What `copy` brings is demanded now: it is settled here, among the others."""
        self._demanded.append(copy)

    def settle(self, copy: ExpertCopy) -> None:
        """Wait for a copy, count it and give its RAM slot back."""
        copy.end.wait()
        seconds = copy.end.seconds_since(copy.begin)
        self.copies += 1
        self.nbytes += self._stride
        self.busy_s += seconds
        if self._split is not None:
            self._split.observed("link", seconds)
        self._ram.residency.let_go(copy.source)

    def settle_all(self) -> None:
        """Wait for every demanded copy."""
        while self._settle_oldest():
            pass

    def is_idle(self) -> bool:
        """Whether every demanded copy is over; settles those that are. Does not wait."""
        while self._demanded and self._demanded[0].end.done():
            self._settle_oldest()
        return not self._demanded

    def abandon(self) -> None:
        """A step broke off, and the device has been waited for. RAM is to be abandoned as well."""
        self._demanded.clear()

    def _settle_oldest(self) -> bool:
        """Wait for the oldest demanded copy; False if there is none."""
        if not self._demanded:
            return False
        self.settle(self._demanded.popleft())
        return True

    def _give_back(self) -> bool:
        with self._device.guard():  # it may be for another device that RAM needs the slot
            return self._settle_oldest()
