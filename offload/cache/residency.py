"""Which expert is in which slot, and what has to move for a layer to be computed.

Owns slots, pins, loads in flight and the order of decisions; `victims` finds what has to go. Must not know files,
tensors, threads or time: the executor performs what is decided here, the simulator charges it to a clock, and both
drive it through the same `serve`, so a recorded run can be replayed exactly.

Every slot is in one of four states:
  free      holds nothing
  loading   promised to an expert whose bytes are on their way; never a victim
  pinned    in use by a computation or a copy; never a victim
  resident  holds an expert, may be evicted
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offload.cache.decisions import Decision, Load, Service, new_decision, new_load, new_service
from offload.cache.policy import CachePolicy, Routing
from offload.cache.victims import Victims
from offload.errors import BudgetError
from offload.telemetry import CacheEvents


def chosen(ids: Routing) -> list[int]:
    """The experts in `ids`, ascending."""
    return sorted(ids[0]) if len(ids) == 1 else sorted({expert for row in ids for expert in row})


class Residency:
    """The expert cache of one tier, without the bytes.

    `floor` is the number of slots of a layer that no other layer may take away, as long as there is any other victim:
    without it a global budget starves the layers that happen to be cold. The policy says how much of the slots floors
    may take up (`floor_share`).
    `width` bounds the loads of one wave, so that a sweep over a whole layer recycles a few slots; it is lowered where
    two waves would take more than a quarter of the slots.
    `leads` is False for a tier that follows another one's policy: only one of them tells it of evictions.
    """

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
        self.there = np.full((shape.layers, shape.experts), -1, np.int32)
        """[layers, E]: the slot of every expert whose bytes are there, -1 for the others. Always up to date."""
        self._there: Any = self.there.reshape(-1).data  # by key: single items without numpy's overhead
        self._slot_of = [-1] * shape.keys
        self._key_of = [-1] * slots
        self._free = list(range(slots - 1, -1, -1))
        self._pinned: set[int] = set()
        self._held: dict[int, int] = {}  # slot -> number of holds beyond its decision
        self._lent: set[int] = set()
        self._loading: dict[int, Load] = {}
        self._prefetched: set[int] = set()
        self._victims = Victims(policy, self.floor, self._slot_of, self._key_of, self._pinned, leads=leads)

    # -- one layer of one step ---------------------------------------------------------------

    def begin_step(self, tokens: Sequence[int], upcoming: Sequence[int] = ()) -> bool:
        """A forward pass over `tokens` begins; `upcoming` are tokens already known to follow them.

        Returns whether values changed: tiers that follow the same policy must `refresh`.
        """
        changed = self.policy.begin_step(tokens, upcoming)
        if changed:
            self.refresh()
        return changed

    def learn(self, tokens: Sequence[int], routing: Sequence[Routing]) -> None:
        """A pass over `tokens` that was not begun here has used `routing` in its first layers. See the policy."""
        self.policy.learn(tokens, routing)
        self.refresh()

    def refresh(self) -> None:
        """The policy's values have changed in any layer."""
        self._victims.refresh()

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
        return chosen(ids)

    def used(self, layer: int, experts: Sequence[int]) -> None:
        """`experts`, each named once and all of them resident, have been computed from.

        What `open`, `complete` and `release` would do: such a layer needs no decision and no pins, if its slots
        are computed from before the next one is made.
        """
        self.events.hits += len(experts)
        if self._prefetched:
            base = layer * self.shape.experts
            self._count_prefetched([(expert, self._slot_of[base + expert]) for expert in experts])
        self._victims.changed.add(layer)

    def open(self, layer: int, wanted: list[int], start: Callable[[Decision], None]) -> Service:
        """The first half of `serve`: decide the first wave of `wanted` (ascending) and begin its reads."""
        self._victims.changed.add(layer)
        held, waiting = self._decide(layer, wanted, first=True)
        if held.slots:
            start(held)
        return new_service((held, waiting))

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
        return new_decision((layer, found, joins, loads, slots)), missing

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
        self._victims.unpinned()

    def hold(self, slot: int) -> None:
        """Keep `slot` from becoming a victim until `let_go`, released or not: a copy or kernel is on its way.

        Holds add up.
        """
        key = self._key_of[slot]
        assert key >= 0, "an empty slot needs no hold"
        self._held[slot] = self._held.get(slot, 0) + 1
        self._victims.close(key)

    def let_go(self, slot: int) -> None:
        """The end of one `hold`."""
        left = self._held[slot] - 1
        if left:
            self._held[slot] = left
            return
        del self._held[slot]
        if slot not in self._loading:
            self._victims.open(self._key_of[slot])

    # -- loads -------------------------------------------------------------------------------

    def loaded(self, slot: int) -> None:
        """The bytes of a load have arrived."""
        self._there[self._key_of[slot]] = slot
        del self._loading[slot]
        if slot not in self._held:
            self._victims.open(self._key_of[slot])

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
            self._slot_of[load.victim] = self._there[load.victim] = slot
            self._key_of[slot] = load.victim
            self._victims.count(load.victim // self.shape.experts, 1)
            self._victims.open(load.victim)
            self.events.evictions -= 1
        del self._loading[slot]

    def abandon(self) -> None:
        """A step broke off: nothing computes from a slot or copies it any more, nothing is being read.

        Slots whose bytes had not arrived become free. Right also when the step was interrupted anywhere in this class
        or `Victims`: an expert is resident if it and its slot name each other and no load does, which is why loads are
        noted before anything else changes and crossed out after everything else.
        """
        slot_of, key_of, loading = self._slot_of, self._key_of, self._loading
        resident = {s: key for s, key in enumerate(key_of) if key >= 0 and slot_of[key] == s and s not in loading}
        slot_of[:] = [-1] * len(slot_of)
        key_of[:] = [-1] * len(key_of)
        self.there.fill(-1)
        for slot, key in resident.items():
            slot_of[key], key_of[slot], self._there[key] = slot, key, slot
        taken = resident.keys() | self._lent
        self._free[:] = [slot for slot in range(self.slots - 1, -1, -1) if slot not in taken]
        self._prefetched &= resident.keys()
        self._pinned.clear()
        self._held.clear()
        loading.clear()
        self._victims.restart(resident.values())

    def prefetch(self, layer: int, expert: int, *, worth: float = 0.5, margin: float = 1.25) -> Load | None:
        """A slot for an expert that is only expected, or None if nothing worth less is there.

        Hysteresis: an occupied slot is given up only if `margin` times the value of its expert is below that
        of the new one, which is at least `worth`: it is probably needed within the step.
        """
        if self._slot_of[layer * self.shape.experts + expert] >= 0:
            return None
        if not self._free:
            victim = self._victims.least(layer)
            if victim < 0:
                return None
            lost = self.policy.values[divmod(victim, self.shape.experts)]
            if lost + abs(lost) * (margin - 1.0) >= max(self.policy.values[layer, expert], worth):
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
        # A policy that has learned from a trace took its experts for residents.
        self._victims.tell([key for key, slot in enumerate(self._slot_of) if slot < 0])
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
                self._victims.close(key)
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

    def best_absent(self, layer: int) -> int | None:
        """The expert of `layer` of highest value that has no slot; None if all have one."""
        absent = ~self.at_hand(layer)
        if not absent.any():
            return None
        return int(np.where(absent, self.policy.values[layer], -inf).argmax())

    def contents(self) -> list[tuple[int, int]]:
        """(layer, expert) of every slot in use, in key order."""
        experts = self.shape.experts
        return [divmod(key, experts) for key, slot in enumerate(self._slot_of) if slot >= 0]

    def check(self) -> None:
        """Assert that the tables agree with each other; for tests and for idle moments."""
        used = {slot: key for key, slot in enumerate(self._slot_of) if slot >= 0}
        assert len(used) == sum(slot >= 0 for slot in self._slot_of), "two experts in one slot"
        assert not used.keys() & set(self._free), "a slot in use is in the free list"
        assert len(set(self._free)) == len(self._free), "a slot is free twice"
        assert not self._lent & (used.keys() | set(self._free)), "a lent slot is in use"
        assert len(used) + len(self._free) + len(self._lent) == self.slots, "a slot is lost"
        assert all(self._key_of[slot] == key for slot, key in used.items()), "slot and expert disagree"
        taken = self._pinned | self._held.keys()
        assert taken <= used.keys(), "a pinned slot holds nothing"
        closed = self._held.keys() | self._loading.keys()
        self._victims.check({key for slot, key in used.items() if slot not in closed})
        assert set(self._loading) <= used.keys(), "a loading slot belongs to nobody"
        there = {slot: key for slot, key in used.items() if slot not in self._loading}
        shown = {int(slot): key for key, slot in enumerate(self.there.reshape(-1)) if slot >= 0}
        assert shown == there, "what is there is not what is shown"
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
            load = loading[slot] = new_load((expert, slot, victim))
            slot_of[base + expert] = slot
            key_of[slot] = base + expert
            loads.append(load)
        self._victims.count(layer, len(loads))
        return loads

    def _evict(self, layer: int, count: int) -> list[tuple[int, int]]:
        """Take the slots of up to `count` evictable experts of lowest value: (slot, key), the lowest first."""
        slot_of, there = self._slot_of, self._there
        taken = []
        for key in self._victims.take(layer, count):
            taken.append((slot_of[key], key))
            slot_of[key] = there[key] = -1
        self.events.evictions += len(taken)
        if self._prefetched:
            wasted = self._prefetched.intersection([slot for slot, _ in taken])
            self._prefetched -= wasted
            self.events.prefetch_wasted += len(wasted)
        return taken

    def _vacate(self, slot: int) -> None:
        key = self._key_of[slot]
        self._slot_of[key] = self._there[key] = -1
        self._key_of[slot] = -1
        self._victims.count(key // self.shape.experts, -1)
