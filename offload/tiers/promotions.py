"""Copies to a device that nobody asked for: experts that later layers will probably need, while the link idles.

Owns which of them are under way and what becomes of them: admitted when they have arrived, or joined by a demand
that comes first. Must not know kernels, nor what an expert is worth: `LookAhead` and the residency of the device do.
"""

from __future__ import annotations

from collections.abc import Sequence

from offload.cache.lookahead import LookAhead
from offload.cache.residency import Residency
from offload.tiers.device import Stream
from offload.tiers.link import ExpertCopy, Link

AT_A_TIME = 1
"""Experts copied on speculation at a time: a demand behind them waits no longer than that."""

LAYERS_AHEAD = 2
"""How far ahead at least experts are copied on speculation."""

MARGIN = 1.5
"""By how much an expert must be worth more than the one it displaces on speculation."""


class Promotions:
    """Speculative copies over `link` from the slots of `below` to those of `here`, for the layers `layers`.

    None without a `lookahead`.
    """

    def __init__(
        self, link: Link, here: Residency, below: Residency, layers: range, lookahead: LookAhead | None
    ) -> None:
        self.lookahead = lookahead
        self._link = link
        self._here = here
        self._below = below
        self._layers = layers
        self._under_way: dict[int, ExpertCopy] = {}  # by slot

    @property
    def pending(self) -> bool:
        """Whether any has not been admitted yet."""
        return bool(self._under_way)

    def begin_step(self, tokens: Sequence[int]) -> None:
        """A forward pass over `tokens` begins."""
        if self.lookahead:
            self.lookahead.begin_step(tokens)

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        """A router applied early chose `experts` (best first) for `layer`."""
        if self.lookahead:
            self.lookahead.expect(layer, experts)

    def promote(self, following: int) -> None:
        """If the link idles, copy an expert that the layers from `following` on will probably need, or one that is
        worth more than another here."""
        lookahead = self.lookahead
        if lookahead is None or len(self._under_way) >= AT_A_TIME or not self._link.is_idle():
            return
        reach = max(LAYERS_AHEAD, lookahead.prefetch_depth)
        for layer in range(following, min(following + reach, self._layers.stop)):
            for expert in lookahead.candidates(layer):
                if self._copy(layer, expert, worth=0.5):
                    return
        layer = following if following in self._layers else self._layers.start
        absent = self._here.best_absent(layer)
        if absent is not None:
            self._copy(layer, absent, worth=0.0)

    def join(self, slot: int, compute: Stream) -> None:
        """What is on its way to `slot` is demanded: `compute` waits for it, the host does not."""
        copy = self._under_way[slot]
        compute.wait(copy.end)
        del self._under_way[slot]
        self._link.demand(copy)
        self._here.loaded(slot)

    def admit_arrived(self) -> None:
        """Experts that have arrived count from now on, and so does how earlier ones turned out."""
        for slot in [slot for slot, copy in self._under_way.items() if copy.end.done()]:
            self._admit(slot)
        if self.lookahead:
            events = self._here.events
            self.lookahead.outcome(events.prefetch_useful + events.prefetch_late, events.prefetch_wasted)

    def admit_all(self) -> None:
        """Wait for all of them."""
        for slot in list(self._under_way):
            self._admit(slot)

    def admit_oldest(self) -> None:
        """Wait for one of them, since there is no other slot left."""
        assert self._under_way, "every slot is taken and nothing is under way"
        self._admit(next(iter(self._under_way)))

    def abandon(self) -> None:
        """A step broke off, and the device has been waited for."""
        self._under_way.clear()

    def _copy(self, layer: int, expert: int, worth: float) -> bool:
        source = self._below.slot(layer, expert)
        if source < 0 or self._below.is_loading(source):
            return False
        load = self._here.prefetch(layer, expert, worth=worth, margin=MARGIN)
        if load is None:
            return False
        self._under_way[load.slot] = self._link.copy(source, load.slot)
        return True

    def _admit(self, slot: int) -> None:
        self._link.settle(self._under_way.pop(slot))
        self._here.loaded(slot)
