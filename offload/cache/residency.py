"""Which expert is in which slot, and what has to move for a layer to be computed.

Owns slots, pins, loads in flight and the order of decisions. Must not know files, tensors, threads
or time: the executor performs what is decided here, the simulator charges it to a clock, and both
drive it through the same `serve`, so a recorded run can be replayed exactly.

Every slot is in one of four states:
  free      holds nothing
  loading   promised to an expert whose bytes are on their way; never a victim
  pinned    in use by a computation or a copy; never a victim
  resident  holds an expert, may be evicted
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from operator import index
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from offload.cache.policy import CachePolicy, Routing
from offload.errors import BudgetError


class Load(NamedTuple):
    """Read `expert` into `slot`. The bytes of `victim` (a key, or -1) there are given up."""

    expert: int
    slot: int
    victim: int


class Decision(NamedTuple):
    """What one wave of a layer needs. All its slots are pinned until `release`."""

    layer: int
    hits: list[tuple[int, int]]
    """(expert, slot) whose bytes are there."""
    joins: list[tuple[int, int]]
    """(expert, slot) that a prefetch is already reading."""
    loads: list[Load]
    slots: list[int]
    """All slots this decision pins; none if nothing could be decided before others are released."""


class Service(NamedTuple):
    """A layer whose first wave is under way."""

    held: Decision
    waiting: list[int]
    """Experts that no wave has taken up yet."""

    @property
    def layer(self) -> int:
        """Whose experts they are."""
        return self.held.layer


# What Load(...) and the others do, in half the time.
_new_load = partial(tuple.__new__, Load)
_new_decision = partial(tuple.__new__, Decision)
_new_service = partial(tuple.__new__, Service)


@dataclass
class CacheEvents:
    """What a replay of the same trace must reproduce."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    prefetch_issued: int = 0
    prefetch_useful: int = 0
    prefetch_late: int = 0
    prefetch_wasted: int = 0
    prefetch_cancelled: int = 0

    @property
    def absent(self) -> int:
        """Demands whose expert had to be fetched, ahead of time or not."""
        return self.misses + self.prefetch_useful + self.prefetch_late


class Residency:
    """The expert cache of one tier, without the bytes.

    `floor` is the number of slots of a layer that no other layer may take away, as long as there
    is any other victim: without it a global budget starves the layers that happen to be cold. The
    policy says how much of the slots floors may take up (`floor_share`).
    `width` bounds the loads of one wave, so that a sweep over a whole layer recycles a few slots;
    it is lowered where two waves would take more than a quarter of the slots.
    `leads` is False for a tier that follows another one's policy: only one of them tells it of evictions.
    """

    # Python keeps up to 30 attributes of an object where it finds them quickest; with slots, any number.
    # fmt: off
    __slots__ = (
        "_cheapest", "_cheapest_expert", "_closed", "_closed_at", "_first_key", "_free", "_held", "_key_of",
        "_layer_count", "_least_offer", "_lent", "_loading", "_lowest", "_offer", "_offer_at", "_passed",
        "_pinned", "_prefetched", "_revision", "_rows", "_slot_of", "_tell", "_unranked", "_values",
        "_values_at", "_worth", "_worth_at", "events", "floor", "policy", "shape", "slots", "width",
    )
    # fmt: on

    def __init__(self, policy: CachePolicy, slots: int, *, floor: int, width: int = 16, leads: bool = True) -> None:
        shape = policy.shape
        if slots < 1:
            raise BudgetError(f"an expert cache needs at least 1 slot, not {slots}")
        self.policy = policy
        self.shape = shape
        self.slots = slots
        self.floor = max(0, min(floor, int(policy.floor_share * slots) // shape.layers))
        self.width = min(max(width, 1), max(shape.top_k, slots // 8))
        self.events = CacheEvents()
        self._slot_of = [-1] * shape.keys
        self._key_of = [-1] * slots
        self._free = list(range(slots - 1, -1, -1))
        self._pinned: set[int] = set()
        self._held: dict[int, int] = {}  # slot -> number of holds beyond its decision
        self._lent: set[int] = set()
        self._loading: dict[int, Load] = {}
        self._prefetched: set[int] = set()
        self._layer_count = [0] * shape.layers
        # Search for victims: `closed` is 0 where an expert could be evicted if it is not pinned, infinite elsewhere,
        # `worth` = values + closed, and per layer the cheapest expert that is not pinned and its worth. `offer` is
        # that worth, but infinite for layers at their floor. Pins change with every layer and seldom name the
        # cheapest expert: they are not written down there, but passed over where the search meets them.
        self._values = policy.values
        self._revision = policy.revision
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
        self._unranked: set[int] = set()  # layers where anything has changed since their cheapest was found
        self._passed: set[int] = set()  # layers with pinned experts that were passed over
        overridden = type(policy).evicted is not CachePolicy.evicted
        self._tell = policy.evicted if overridden and leads else None

    # -- one layer of one step ---------------------------------------------------------------

    def begin_step(self, tokens: Sequence[int], upcoming: Sequence[int] = ()) -> bool:
        """A forward pass over `tokens` begins; `upcoming` are tokens already known to follow them.

        Returns whether values changed: tiers that follow the same policy must `refresh`.
        """
        changed = self.policy.begin_step(tokens, upcoming)
        if changed:
            self.refresh()
        return changed

    def refresh(self) -> None:
        """The policy's values have changed in any layer."""
        self._revision = self.policy.revision
        self._unranked.clear()
        np.add(self._values, self._closed, out=self._worth)
        cheapest = self._worth.argmin(axis=1)
        self._cheapest_expert = cheapest.tolist()
        self._offer[:] = self._worth.reshape(-1)[cheapest + self._first_key]
        self._cheapest = self._offer.tolist()
        for layer, count in enumerate(self._layer_count):
            if count <= self.floor:
                self._offer_at[layer] = inf
        self._unranked.update(self._key_of[slot] // self.shape.experts for slot in self._pinned)

    def serve(
        self, layer: int, ids: Routing, start: Callable[[Decision], None], finish: Callable[[Decision], None]
    ) -> None:
        """Bring every expert of `ids` into a slot once, in as few waves as the slots allow.

        `start` is called with each decision as soon as it is made and begins its reads; `finish`
        waits for them and computes, after which the slots are released. Up to two waves are open
        at a time: the reads of the next one overlap the computation of this one. The first wave
        holds all hits; misses come in ascending order, which is file order.
        """
        self.complete(self.open(layer, self.observe(layer, ids), start), start, finish)

    def observe(self, layer: int, ids: Routing) -> list[int]:
        """Let the policy learn what the router chose; returns the experts in it, ascending."""
        self.policy.observe(layer, ids)
        return sorted(ids[0]) if len(ids) == 1 else sorted({expert for row in ids for expert in row})

    def take(self, layer: int, experts: Sequence[int]) -> list[int] | None:
        """The slots of `experts`, each named once, if all are resident; None, with nothing changed, if not.

        What `open`, `complete` and `release` would do: such a layer needs no decision and no pins, if its slots
        are computed from before the next one is made.
        """
        base, slot_of = layer * self.shape.experts, self._slot_of
        slots = [slot_of[base + expert] for expert in experts]
        if min(slots) < 0 or (self._loading and not self._loading.keys().isdisjoint(slots)):
            return None
        self.events.hits += len(slots)
        if self._prefetched and not self._prefetched.isdisjoint(slots):
            self.events.prefetch_useful += len(self._prefetched.intersection(slots))
            self._prefetched.difference_update(slots)
        self._unranked.add(layer)
        return slots

    def open(self, layer: int, wanted: list[int], start: Callable[[Decision], None]) -> Service:
        """The first half of `serve`: decide the first wave of `wanted` (ascending) and begin its reads."""
        self._unranked.add(layer)
        held, waiting = self._decide(layer, wanted, first=True)
        if held.slots:
            start(held)
        return _new_service((held, waiting))

    def complete(
        self,
        service: Service,
        start: Callable[[Decision], None],
        finish: Callable[[Decision], None],
        stuck: Callable[[], None] | None = None,
    ) -> None:
        """The second half of `serve`: everything that `open` left to do.

        `stuck` is called when nothing can go on because every slot is held or loading outside of this
        service; it must let go of a slot or settle a load.
        """
        held, waiting = service
        while waiting:
            following, waiting = self._decide(held.layer, waiting, first=False)
            if following.slots:
                start(following)
            if held.slots:
                finish(held)
                self.release(held)
            elif not following.slots:
                assert stuck is not None, "no slot can be had, and nobody is there to let one go"
                stuck()
            held = following
        if held.slots:
            finish(held)
            self.release(held)

    def _decide(self, layer: int, wanted: list[int], first: bool) -> tuple[Decision, list[int]]:
        found, slots, missing = self._find(layer, wanted) if first else ([], [], wanted)
        joins: list[tuple[int, int]] = []
        loads: list[Load] = []
        if found and self._loading:
            loading = self._loading
            joins = [pair for pair in found if pair[1] in loading]
            found = [pair for pair in found if pair[1] not in loading]
        if missing:
            count = len(missing)
            spare = self.slots - len(self._lent) - len(self._pinned) - len(self._loading) - len(self._held)
            if count > self.width or count > spare:
                count = self._bounded(count, first)
            loads = self._place(layer, missing[:count])
            slots += [slot for _, slot, _ in loads]
            self._pinned.update(slots)
            self.events.misses += len(loads)
            missing = missing[len(loads) :]
        return _new_decision((layer, found, joins, loads, slots)), missing

    def _bounded(self, missing: int, first: bool) -> int:
        """The loads of one wave, of which `missing` are wanted."""
        count = min(missing, self.width)
        room = self.slots - len(self._lent) - len(self._pinned | self._loading.keys() | self._held.keys())
        if first and (count > room or count < missing):
            # More waves follow: leave room for the next one to be read during this one.
            return min(count, max(room // 2, 1))
        return min(count, room)

    def _find(self, layer: int, wanted: list[int]) -> tuple[list[tuple[int, int]], list[int], list[int]]:
        """Pin those of `wanted` that have a slot: (expert, slot) of each, the slots alone, and the other experts."""
        slot_of, base = self._slot_of, layer * self.shape.experts
        found, slots, missing = [], [], []
        for expert in wanted:
            slot = slot_of[base + expert]
            if slot < 0:
                missing.append(expert)
            else:
                found.append((expert, slot))
                slots.append(slot)
        self._pinned.update(slots)
        self.events.hits += len(found)
        if self._prefetched:
            self._count_prefetched(found)
        return found, slots, missing

    def _count_prefetched(self, found: list[tuple[int, int]]) -> None:
        for _, slot in found:
            if slot in self._prefetched:
                self._prefetched.discard(slot)
                if slot in self._loading:
                    self.events.prefetch_late += 1
                else:
                    self.events.prefetch_useful += 1

    def release(self, decision: Decision) -> None:
        """The computation of `decision` is over; its slots may become victims."""
        self._pinned.difference_update(decision.slots)
        if self._passed:
            self._unranked |= self._passed
            self._passed.clear()

    def hold(self, slot: int) -> None:
        """Keep `slot` from becoming a victim until `let_go`, released or not: a copy or kernel is on its way.

        Holds add up.
        """
        key = self._key_of[slot]
        assert key >= 0, "an empty slot needs no hold"
        self._held[slot] = self._held.get(slot, 0) + 1
        if self._closed_at[key] == 0.0:
            self._closed_at[key] = inf
            self._unranked.add(key // self.shape.experts)

    def let_go(self, slot: int) -> None:
        """The end of one `hold`."""
        left = self._held[slot] - 1
        if left:
            self._held[slot] = left
            return
        del self._held[slot]
        if slot not in self._loading:
            self._open(self._key_of[slot])

    # -- loads -------------------------------------------------------------------------------

    def loaded(self, slot: int) -> None:
        """The bytes of a load have arrived."""
        del self._loading[slot]
        if slot not in self._held:
            self._open(self._key_of[slot])

    def failed(self, slot: int) -> None:
        """The bytes of a load will not come: the slot is free, the expert not resident."""
        self._prefetched.discard(slot)
        self._pinned.discard(slot)
        self._vacate(slot)
        self._free.append(slot)
        del self._loading[slot]

    def cancelled(self, slot: int) -> None:
        """A queued prefetch was withdrawn before its read began: the victim's bytes are intact."""
        load = self._loading[slot]
        self._prefetched.discard(slot)
        self._vacate(slot)
        self.events.prefetch_cancelled += 1
        if load.victim < 0 or self._slot_of[load.victim] >= 0:
            self._free.append(slot)
        else:
            self._occupy(slot, load.victim)
            self._open(load.victim)
            self.events.evictions -= 1
        del self._loading[slot]

    def abandon(self) -> None:
        """A step broke off: nothing computes from a slot or copies it any more, nothing is being read.

        Slots whose bytes had not arrived become free. Right also when the step was interrupted anywhere in this class:
        an expert is resident if it and its slot name each other and no load does, which is why loads are noted before
        anything else changes and crossed out after everything else.
        """
        experts, slot_of, key_of = self.shape.experts, self._slot_of, self._key_of
        loading = self._loading
        resident = {s: key for s, key in enumerate(key_of) if key >= 0 and slot_of[key] == s and s not in loading}
        slot_of[:] = [-1] * len(slot_of)
        key_of[:] = [-1] * len(key_of)
        self._layer_count[:] = [0] * self.shape.layers
        self._closed.fill(inf)
        for slot, key in resident.items():
            slot_of[key], key_of[slot] = slot, key
            self._layer_count[key // experts] += 1
            self._closed_at[key] = 0.0
        taken = resident.keys() | self._lent
        self._free[:] = [slot for slot in range(self.slots - 1, -1, -1) if slot not in taken]
        self._prefetched &= resident.keys()
        self._pinned.clear()
        self._passed.clear()
        self._held.clear()
        loading.clear()
        self.refresh()

    def prefetch(self, layer: int, expert: int, *, worth: float = 0.5, margin: float = 1.25) -> Load | None:
        """A slot for an expert that is only expected, or None if nothing worth less is there.

        Hysteresis: an occupied slot is given up only if `margin` times the value of its expert is below that
        of the new one, which is at least `worth`: it is probably needed within the step.
        """
        if self._slot_of[layer * self.shape.experts + expert] >= 0:
            return None
        if not self._free:
            self._rank_changed()
            self._offer_at[layer] = self._cheapest[layer]
            owner = self._cheapest_layer()
            self._count(layer, 0)
            if owner < 0:
                return None
            lost = self._values[owner, self._cheapest_expert[owner]]
            if lost + abs(lost) * (margin - 1.0) >= max(self._values[layer, expert], worth):
                return None
        load = self._place(layer, [expert])[0]
        self._prefetched.add(load.slot)
        self.events.prefetch_issued += 1
        return load

    def warm(self, keys: Sequence[int]) -> list[tuple[int, Load]]:
        """(layer, load) for as many of `keys`, in their order, as there are free slots. Before anything runs."""
        loads = []
        for layer, expert in (divmod(key, self.shape.experts) for key in keys[: len(self._free)]):
            loads.append((layer, self._place(layer, [expert])[0]))
        if self._tell is not None:  # a policy that has learned from a trace took its experts for residents
            for key, slot in enumerate(self._slot_of):
                if slot < 0:
                    self._tell(*divmod(key, self.shape.experts))
        return loads

    def lend(self, slots: range) -> None:
        """Give up `slots` for another use until `give_back`; none of them may be in use or loading."""
        for slot in slots:
            assert not self.is_pinned(slot) and slot not in self._loading, "a slot in use cannot be lent"
            key = self._key_of[slot]
            if key < 0:
                self._free.remove(slot)
            else:
                self._vacate(slot)
                self._closed_at[key] = inf
                self.events.evictions += 1
                if slot in self._prefetched:
                    self._prefetched.discard(slot)
                    self.events.prefetch_wasted += 1
            self._lent.add(slot)
        self.refresh()

    def give_back(self) -> None:
        """The end of `lend`: the slots are free."""
        self._free += sorted(self._lent)
        self._lent.clear()

    # -- questions ---------------------------------------------------------------------------

    def slot(self, layer: int, expert: int) -> int:
        """Slot that holds or will hold an expert, -1 if none."""
        return self._slot_of[layer * self.shape.experts + expert]

    def at_hand(self, layer: int) -> NDArray[np.bool_]:
        """Which experts of a layer need no further read, [E]: their bytes are in a slot or on their way to one."""
        base = layer * self.shape.experts
        return np.asarray(self._slot_of[base : base + self.shape.experts]) >= 0

    def holder(self, slot: int) -> tuple[int, int] | None:
        """(layer, expert) that `slot` holds or awaits; None if it is free."""
        key = self._key_of[slot]
        return divmod(key, self.shape.experts) if key >= 0 else None

    def is_loading(self, slot: int) -> bool:
        """Whether bytes of `slot` are on their way."""
        return slot in self._loading

    def is_pinned(self, slot: int) -> bool:
        """Whether a computation or a copy needs `slot`."""
        return slot in self._pinned or slot in self._held

    @property
    def resident(self) -> int:
        """Number of slots that hold or await an expert."""
        return self.slots - len(self._free) - len(self._lent)

    def table(self) -> list[list[int]]:
        """Slot of every expert, [layers][experts]; -1 for those that have none."""
        experts = self.shape.experts
        return [self._slot_of[base : base + experts] for base in range(0, self.shape.keys, experts)]

    def best_absent(self, layer: int) -> int | None:
        """The expert of `layer` of highest value that has no slot; None if all have one."""
        base = layer * self.shape.experts
        absent = np.asarray(self._slot_of[base : base + self.shape.experts]) < 0
        if not absent.any():
            return None
        return int(np.where(absent, self._values[layer], -inf).argmax())

    def contents(self) -> list[tuple[int, int]]:
        """(layer, expert) of every slot in use, in key order."""
        experts = self.shape.experts
        return [divmod(key, experts) for key, slot in enumerate(self._slot_of) if slot >= 0]

    def check(self) -> None:
        """Assert that the tables agree with each other; for tests and for idle moments."""
        self._rank_changed()
        used = {slot: key for key, slot in enumerate(self._slot_of) if slot >= 0}
        assert len(used) == sum(slot >= 0 for slot in self._slot_of), "two experts in one slot"
        assert not used.keys() & set(self._free), "a slot in use is in the free list"
        assert len(set(self._free)) == len(self._free), "a slot is free twice"
        assert not self._lent & (used.keys() | set(self._free)), "a lent slot is in use"
        assert len(used) + len(self._free) + len(self._lent) == self.slots, "a slot is lost"
        counts = [0] * self.shape.layers
        for slot, key in used.items():
            assert self._key_of[slot] == key, "slot and expert disagree"
            counts[key // self.shape.experts] += 1
        assert counts == self._layer_count, "slots per layer are miscounted"
        for layer, count in enumerate(counts):
            guarded = count <= self.floor
            assert self._offer[layer] == (inf if guarded else self._cheapest[layer]), "an offer is out of date"
        taken = self._pinned | self._held.keys()
        assert taken <= used.keys(), "a pinned slot holds nothing"
        open_keys = {key for slot, key in used.items() if slot not in self._held.keys() | self._loading.keys()}
        assert set(np.flatnonzero(self._closed == 0.0).tolist()) == open_keys, "victims disagree"
        worth, pinned = self._values + self._closed, [used[slot] for slot in self._pinned]
        passed = np.isin(np.arange(self.shape.keys), pinned).reshape(worth.shape) & np.isinf(self._worth)
        assert np.array_equal(np.where(passed, inf, self._worth), np.where(passed, inf, worth)), (
            "worth is out of date"
        )
        worth.reshape(-1)[pinned] = inf
        assert np.array_equal(worth.min(axis=1), self._cheapest), "cheapest is out of date"
        assert set(self._loading) <= used.keys(), "a loading slot belongs to nobody"
        assert self._prefetched <= used.keys(), "a prefetched slot holds nothing"

    # -- slots -------------------------------------------------------------------------------

    def _place(self, layer: int, experts: list[int]) -> list[Load]:
        """Give slots to as many of `experts` as there are victims for; mark them loading."""
        free, slot_of, key_of, loading = self._free, self._slot_of, self._key_of, self._loading
        places = [(free.pop(), -1) for _ in experts[: len(free)]] if free else []
        if len(places) < len(experts):
            places += self._evict(layer, len(experts) - len(places))
        base = layer * self.shape.experts
        loads = []
        for expert, (slot, victim) in zip(experts, places, strict=False):
            load = loading[slot] = _new_load((expert, slot, victim))
            slot_of[base + expert] = slot
            key_of[slot] = base + expert
            loads.append(load)
        self._count(layer, len(loads))
        return loads

    def _evict(self, layer: int, count: int) -> list[tuple[int, int]]:
        """Take the slots of up to `count` evictable experts of lowest value: (slot, key), the lowest first.

        The offer of `layer` is out of date until what it puts there is counted.
        """
        self._rank_changed()
        experts, slot_of, layer_count, offer_at = self.shape.experts, self._slot_of, self._layer_count, self._offer_at
        offer_at[layer] = self._cheapest[layer]  # a layer may replace its own, floor or not
        taken: list[tuple[int, int]] = []
        for _ in range(count):
            owner = self._cheapest_layer()
            if owner < 0:
                break
            key = owner * experts + self._cheapest_expert[owner]
            taken.append((slot_of[key], key))
            slot_of[key] = -1
            self._closed_at[key] = self._worth_at[key] = inf
            worth = self._seek(owner)
            left = layer_count[owner] = layer_count[owner] - 1
            offer_at[owner] = worth if left > self.floor or owner == layer else inf
        self.events.evictions += len(taken)
        if self._prefetched:
            wasted = self._prefetched.intersection([slot for slot, _ in taken])
            self._prefetched -= wasted
            self.events.prefetch_wasted += len(wasted)
        if self._tell is not None:
            for _, key in taken:
                self._tell(*divmod(key, experts))
            # A follower may still hold them; here they are no candidates, and every other one has just been ranked.
            self._revision = self.policy.revision
        return taken

    def _cheapest_layer(self) -> int:
        """The layer of the evictable expert of lowest value, one at its floor only for want of others; -1 if none."""
        layer = index(self._least_offer())
        if self._offer_at[layer] < inf:
            return layer
        least = min(self._cheapest)
        return self._cheapest.index(least) if least < inf else -1

    def _rank_changed(self) -> None:
        """Find the cheapest evictable expert of every layer where anything has changed.

        Its worth is infinite if there is none.
        """
        if self._revision != self.policy.revision:
            self.refresh()
        for layer in self._unranked:
            values, closed, row = self._rows[layer]
            np.add(values, closed, row)
            worth = self._seek(layer)
            self._offer_at[layer] = worth if self._layer_count[layer] > self.floor else inf
        self._unranked.clear()

    def _seek(self, layer: int) -> float:
        """Find the cheapest expert of `layer` that is not pinned, and its worth."""
        base, lowest, worth_at = layer * self.shape.experts, self._lowest[layer], self._worth_at
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

    def _open(self, key: int) -> None:
        """The expert may be evicted from now on, unless it is pinned."""
        layer = key // self.shape.experts
        self._closed_at[key] = 0.0
        worth = self._worth_at[key] = self._values_at[key]
        if worth <= self._cheapest[layer]:
            self._unranked.add(layer)

    def _occupy(self, slot: int, key: int) -> None:
        self._slot_of[key] = slot
        self._key_of[slot] = key
        self._count(key // self.shape.experts, 1)

    def _vacate(self, slot: int) -> None:
        key = self._key_of[slot]
        self._slot_of[key] = -1
        self._key_of[slot] = -1
        self._count(key // self.shape.experts, -1)

    def _count(self, layer: int, change: int) -> None:
        count = self._layer_count[layer] = self._layer_count[layer] + change
        self._offer_at[layer] = self._cheapest[layer] if count > self.floor else inf
