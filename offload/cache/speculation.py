"""Reads ahead: what is granted of the wishes, and what a replay takes routers to have foreseen.

Owns the step from candidates to loads, which a run and a replay share. Must not know reads or time: whoever asks
carries a load out, or takes it for done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from offload.cache.decisions import Load
from offload.cache.lookahead import LookAhead
from offload.cache.residency import Residency
from offload.cache.trace import Trace

LOOKAHEAD_LAYERS = 3
LOOKAHEAD_READS = 4
"""How far ahead at least, and how many experts at a time, are read on speculation."""

RIGHT = 0.82
"""Share of what a router applied a layer early names that is then chosen, where a trace does not say: that of the
embedded model. One applied n layers early is right in the n-th power of it (for two, 67% as measured)."""


def granted(lookahead: LookAhead, residency: Residency, first: int, under_way: int) -> Iterator[tuple[int, Load]]:
    """(layer, load) for what the layers from `first` on will probably need, beside `under_way` such loads."""
    layers = residency.shape.layers
    # Spare slots only: a demand never finds every slot taken by speculation.
    room = min(LOOKAHEAD_READS, residency.slots - residency.shape.top_k)
    reach = max(LOOKAHEAD_LAYERS, lookahead.prefetch_depth)
    for layer in range(first, min(first + reach, layers)):
        for expert in lookahead.candidates(layer):
            if under_way >= room:
                return
            load = residency.prefetch(layer, expert)
            if load is not None:
                under_way += 1
                yield layer, load


def right_share(trace: Trace) -> float:
    """How often routers applied early were right in the recorded run; RIGHT where none were."""
    found = trace.header.get("foretold_right")
    return float(found) if isinstance(found, (int, float)) and 0 <= found <= 1 else RIGHT


def foreseen(trace: Trace, right: float, seed: int = 0) -> NDArray[np.uint16]:  # [T, L, K]
    """What routers applied early might have chosen for `trace`: its choices, but for every one that they get wrong
    what some other token chose there: a wrong choice is one that is right at other times.
    """
    rng = np.random.default_rng(seed)
    experts = trace.experts
    others = np.take_along_axis(experts, rng.integers(len(experts), size=experts.shape), axis=0)
    return np.where(rng.random(experts.shape) < right, experts, others).astype(np.uint16)


class Foresight:
    """Reads ahead in a replay, as a run with `prefetch_depth` would have made them; all of them arrive in time."""

    def __init__(self, trace: Trace, residency: Residency, prefetch_depth: int) -> None:
        self._residency = residency
        self._lookahead = LookAhead(residency.policy, prefetch_depth=prefetch_depth)
        right = right_share(trace)
        self._early = [foreseen(trace, right ** (n + 1), seed=n) for n in range(prefetch_depth)]
        self._token = self._next = 0

    def begin_step(self, tokens: Sequence[int]) -> None:
        """The trace's next pass begins."""
        self._token = self._next
        self._next += len(tokens)
        self._lookahead.begin_step(tokens, self._residency.events.absent)
        self._read(0)

    def before(self, layer: int) -> None:
        """The layer before `layer` has run."""
        if layer >= self._residency.shape.layers:
            return
        for later, early in enumerate(self._early[: self._lookahead.early_routers], layer):
            if later < early.shape[1]:
                self._lookahead.expect(later, early[self._token, later].tolist())
        self._read(layer)
        self._lookahead.learn(self._residency.events)

    def _read(self, layer: int) -> None:
        if self._lookahead.idle:
            return
        for _, load in granted(self._lookahead, self._residency, layer, 0):
            self._residency.loaded(load.slot)
