"""Which resident expert goes next: the search for the one worth least, over all layers, for every expert that comes in.

Owns what experts that may go are worth, and what every layer offers. Must not know loads, waves or events: `residency`
says which experts may go, whose slots are pinned and how many a layer has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf
from operator import index
from typing import Any

import numpy as np

from offload.cache.policy import CachePolicy


class Victims:
    """The experts of one tier that may lose their slots, and which of them is worth least.

    A layer of no more than `floor` experts offers none of them, as long as another layer has a victim. `slot_of` a
    key, `key_of` a slot and `pinned` slots are the tables of the tier, never changed here.

    `closed` is 0 where an expert could be evicted if it is not pinned, infinite elsewhere, `worth` = values + closed,
    and per layer there is the cheapest expert that is not pinned and its worth. `offer` is that worth, but infinite
    for layers at their floor. Pins change with every layer and seldom name the cheapest expert: they are not written
    down there, but passed over where the search meets them.
    """

    def __init__(
        self,
        policy: CachePolicy,
        floor: int,
        slot_of: Sequence[int],
        key_of: Sequence[int],
        pinned: set[int],
        *,
        leads: bool,
    ) -> None:
        self.changed: set[int] = set()
        """Layers where anything has changed since their cheapest expert was found."""
        self._policy = policy
        self._revision = policy.revision
        overridden = type(policy).evicted is not CachePolicy.evicted
        self._told = policy.evicted if overridden and leads else None
        self._floor = floor
        self._slot_of = slot_of
        self._key_of = key_of
        self._pinned = pinned
        self._passed: set[int] = set()  # layers with pinned experts that were passed over
        shape = policy.shape
        self._experts = shape.experts
        self._count = [0] * shape.layers
        self._values = policy.values
        self._closed = np.full_like(self._values, inf)
        self._worth = np.full_like(self._values, inf)
        self._offer = np.full(shape.layers, inf)
        self._first_key = np.arange(shape.layers) * shape.experts
        self._rows = list(zip(self._values, self._closed, self._worth, strict=True))
        # Single items without numpy's overhead.
        self._closed_at: Any = self._closed.reshape(-1).data
        self._lowest = [row.argmin for row in self._worth]
        self._values_at: Any = self._values.reshape(-1).data
        self._worth_at: Any = self._worth.reshape(-1).data
        self._offer_at: Any = self._offer.data
        self._least_offer = self._offer.argmin
        self._cheapest = [inf] * shape.layers
        self._cheapest_expert = [0] * shape.layers

    # -- what may go ---------------------------------------------------------------------------

    def open(self, key: int) -> None:
        """The expert may be evicted from now on, unless it is pinned."""
        layer = key // self._experts
        self._closed_at[key] = 0.0
        worth = self._worth_at[key] = self._values_at[key]
        if worth <= self._cheapest[layer]:
            self.changed.add(layer)

    def close(self, key: int) -> None:
        """The expert must not be evicted, pinned or not, until it is opened again."""
        if self._closed_at[key] == 0.0:
            self._closed_at[key] = inf
            self.changed.add(key // self._experts)

    def unpinned(self) -> None:
        """Slots have left `pinned`. Those that come to it need no word: they are found there."""
        if self._passed:
            self.changed |= self._passed
            self._passed.clear()

    def count(self, layer: int, change: int) -> None:
        """So many slots more, or fewer, belong to experts of `layer`."""
        count = self._count[layer] = self._count[layer] + change
        self._offer_at[layer] = self._cheapest[layer] if count > self._floor else inf

    def refresh(self) -> None:
        """The policy's values have changed in any layer."""
        self._revision = self._policy.revision
        self.changed.clear()
        np.add(self._values, self._closed, out=self._worth)
        cheapest = self._worth.argmin(axis=1)
        self._cheapest_expert = cheapest.tolist()
        self._offer[:] = self._worth.reshape(-1)[cheapest + self._first_key]
        self._cheapest = self._offer.tolist()
        for layer, count in enumerate(self._count):
            if count <= self._floor:
                self._offer_at[layer] = inf
        self.changed.update(self._key_of[slot] // self._experts for slot in self._pinned)

    def restart(self, keys: Iterable[int]) -> None:
        """Whatever was known: `keys` are the experts with a slot, and all of them may be evicted."""
        self._count[:] = [0] * len(self._count)
        self._closed.fill(inf)
        for key in keys:
            self._count[key // self._experts] += 1
            self._closed_at[key] = 0.0
        self._passed.clear()
        self.refresh()

    # -- what goes -----------------------------------------------------------------------------

    def least(self, layer: int) -> int:
        """The key of the victim that an expert of `layer` would replace; -1 if there is none."""
        self._rank()
        self._offer_at[layer] = self._cheapest[layer]
        owner = index(self._least_offer())
        if self._offer_at[owner] == inf:
            owner = self._at_floor()
        self.count(layer, 0)
        return owner * self._experts + self._cheapest_expert[owner] if owner >= 0 else -1

    def take(self, layer: int, count: int) -> list[int]:
        """The keys of up to `count` victims for experts of `layer`, the least worth first: closed, and counted out.

        The offer of `layer` is out of date until what takes their place is counted.
        """
        self._rank()
        experts, counts, offer_at = self._experts, self._count, self._offer_at
        offer_at[layer] = self._cheapest[layer]  # a layer may replace its own, floor or not
        taken: list[int] = []
        for _ in range(count):
            owner = index(self._least_offer())
            if offer_at[owner] == inf:
                owner = self._at_floor()
                if owner < 0:
                    break
            key = owner * experts + self._cheapest_expert[owner]
            taken.append(key)
            self._closed_at[key] = self._worth_at[key] = inf
            worth = self._seek(owner)
            left = counts[owner] = counts[owner] - 1
            offer_at[owner] = worth if left > self._floor or owner == layer else inf
        if self._told is not None:
            self.tell(taken)
            # A follower may still hold them; here they are no candidates, and every other one has just been ranked.
            self._revision = self._policy.revision
        return taken

    def tell(self, keys: Iterable[int]) -> None:
        """Let the policy know which experts have no slot, if it cares and this tier is the one to tell it."""
        if self._told is not None:
            for key in keys:
                self._told(*divmod(key, self._experts))

    def _at_floor(self) -> int:
        """Where no layer offers any: the layer at its floor whose victim is worth least; -1 if there is none."""
        least = min(self._cheapest)
        return self._cheapest.index(least) if least < inf else -1

    def _rank(self) -> None:
        """Find the cheapest evictable expert of every layer where anything has changed.

        Its worth is infinite if there is none.
        """
        if self._revision != self._policy.revision:
            self.refresh()
        for layer in self.changed:
            values, closed, row = self._rows[layer]
            np.add(values, closed, row)
            worth = self._seek(layer)
            self._offer_at[layer] = worth if self._count[layer] > self._floor else inf
        self.changed.clear()

    def _seek(self, layer: int) -> float:
        """Find the cheapest expert of `layer` that is not pinned, and its worth."""
        base, lowest, worth_at = layer * self._experts, self._lowest[layer], self._worth_at
        while True:
            expert = index(lowest())
            worth = worth_at[base + expert]
            if self._slot_of[base + expert] not in self._pinned or worth == inf:
                break
            self._passed.add(layer)
            worth_at[base + expert] = inf
        self._cheapest_expert[layer] = expert
        self._cheapest[layer] = worth
        return worth

    def check(self, open_keys: set[int]) -> None:
        """Assert that nothing here is out of date, given the experts that may go if they are not pinned."""
        self._rank()
        keys = [key for key, slot in enumerate(self._slot_of) if slot >= 0]
        counts = np.bincount(np.asarray(keys, np.intp) // self._experts, minlength=len(self._count)).tolist()
        assert counts == self._count, "slots per layer are miscounted"
        for layer, count in enumerate(counts):
            guarded = count <= self._floor
            assert self._offer[layer] == (inf if guarded else self._cheapest[layer]), "an offer is out of date"
        assert set(np.flatnonzero(self._closed == 0.0).tolist()) == open_keys, "victims disagree"
        worth, pinned = self._values + self._closed, [self._key_of[slot] for slot in self._pinned]
        passed = np.isin(np.arange(worth.size), pinned).reshape(worth.shape) & np.isinf(self._worth)
        assert np.array_equal(np.where(passed, inf, self._worth), np.where(passed, inf, worth)), (
            "worth is out of date"
        )
        worth.reshape(-1)[pinned] = inf
        assert np.array_equal(worth.min(axis=1), self._cheapest), "cheapest is out of date"
