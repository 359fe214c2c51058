"""Copies to a device that nobody asked for: experts that later layers will probably need, while the link idles.

Owns which of them are under way and what becomes of them: admitted when they have arrived, or joined by a demand
that comes first. Decoding needs few experts of a layer and takes one at a time; a long pass needs nearly all of the
next layer and takes many. Must not know kernels, nor what an expert is worth: `LookAhead` and the residency of the
device do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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

SWEEP_ROWS = 4
"""Positions per expert from which on a pass needs nearly all experts of a layer."""

SWEPT = 32
"""Experts of the next layer that are copied at most while a long pass attends, and at most a quarter of the slots."""


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
        self._sweeps = False
        self._weighed = False
        """Whether this step has looked for an expert that is worth more than another, whatever layers will need."""

    @property
    def pending(self) -> bool:
        """Whether any has not been admitted yet."""
        return bool(self._under_way)

    def begin_step(self, tokens: Sequence[int]) -> None:
        """A forward pass over `tokens` begins."""
        if self.lookahead:
            self.lookahead.begin_step(tokens)
        shape = self._here.shape
        self._sweeps = len(tokens) * shape.top_k >= SWEEP_ROWS * shape.experts
        self._weighed = False

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
        if self._weighed:  # what is used comes anyway, so values call for a copy now and then only
            return
        self._weighed = True
        layer = following if following in self._layers else self._layers.start
        absent = self._here.best_absent(layer)
        if absent is not None:
            self._copy(layer, absent, worth=0.0)

    def sweep(self, following: int) -> None:
        """If the pass is long, copy what `following` is going to need: the link idles while the device attends."""
        if self.lookahead is None or not self._sweeps or following not in self._layers:
            return
        absent, values = ~self._here.at_hand(following), self._here.policy.values[following]
        most = min(SWEPT, self._here.slots // 4) - len(self._under_way)
        for expert in [e for e in np.argsort(-values, kind="stable").tolist() if absent[e]][: max(0, most)]:
            self._copy(following, expert, worth=1.0)

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
