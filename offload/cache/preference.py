"""Preferring resident experts within a margin: what is preferred, and how many choices that changed.

Owns the decision behind `--prefer-resident` and its count. Must not know scores or tensors: the router adds the
preference to its own scores.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from offload.cache.policy import Routing
from offload.cache.residency import Residency


class Preference:
    """A lead of `margin` for experts that need no read.

    An expert whose read is under way, a prefetch's included, counts as resident: choosing it costs no further
    bytes. A forward pass that may use every expert of a layer is left alone, for it would change choices and save
    little: those of fewer tokens than E / K only are rerouted (for DeepSeek-V3, below 32).
    """

    def __init__(self, residency: Residency, margin: float) -> None:
        self.margin = margin
        self.choices = 0
        """Choices made while residents were preferred."""
        self.changed = 0
        """Those that exact routing would not have made."""
        self._residency = residency
        self._exact: Routing | None = None

    def of(self, layer: int, exact: Routing) -> NDArray[np.float32] | None:
        """The lead of every expert of `layer`, [E], or None if the exact choice needs no read or is to be kept."""
        shape = self._residency.shape
        self._exact = None
        if len(exact) * shape.top_k >= shape.experts:
            return None
        self.choices += len(exact) * shape.top_k
        at_hand = self._residency.at_hand(layer)
        if at_hand[exact].all():
            return None
        self._exact = exact
        return at_hand * np.float32(self.margin)

    def executed(self, routing: Routing) -> None:
        """`routing` is what runs after the last `of`."""
        if self._exact is not None:
            self.changed += sum(len(set(new) - set(old)) for new, old in zip(routing, self._exact, strict=True))
            self._exact = None
