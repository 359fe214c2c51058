"""Residency against a naive model of itself, on random routing."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest
from routing_samples import SHAPE, routing

from offload.cache.decisions import Decision
from offload.cache.policy import CacheShape, create_policy
from offload.cache.residency import Residency
from offload.errors import BudgetError, UsageError


def make(policy: str, slots: int, trace: list, floor: int = 0, width: int = 16, shape=SHAPE):
    options = {"future": trace} if policy == "belady" else {}
    return Residency(create_policy(policy, shape, **options), slots, floor=floor, width=width)


class Run:
    """Performs decisions at once and checks after each of them."""

    def __init__(self, residency: Residency) -> None:
        self.residency = residency
        self.slot_of: dict[tuple[int, int], int] = {}
        self.open: list[Decision] = []
        self.served: list[int] = []

    def start(self, decision: Decision) -> None:
        base = decision.layer * self.residency.shape.experts
        for expert, slot in decision.hits:
            assert self.slot_of[decision.layer, expert] == slot
        pinned = {slot for held in self.open for slot in held.slots}
        for load in decision.loads:
            assert load.slot not in pinned, "a slot in use became a victim"
            key = divmod(load.victim, self.residency.shape.experts)
            if load.victim >= 0:
                assert self.slot_of.pop(key) == load.slot
            assert load.slot not in self.slot_of.values()
            self.slot_of[decision.layer, load.expert] = load.slot
            assert self.residency.slot(decision.layer, load.expert) == load.slot
            assert base + load.expert != load.victim
        self.open.append(decision)
        assert len(self.open) <= 2
        self.residency.check()

    def finish(self, decision: Decision) -> None:
        assert decision is self.open.pop(0)
        for load in decision.loads:
            self.residency.loaded(load.slot)
        self.served += [e for e, _ in decision.hits] + [load.expert for load in decision.loads]
        self.residency.check()

    def steps(self, trace: list) -> None:
        for step in trace:
            self.residency.begin_step([0] * len(step[0]))
            for layer, ids in enumerate(step):
                self.served = []
                self.residency.serve(layer, ids, self.start, self.finish)
                assert sorted(self.served) == sorted({e for row in ids for e in row})
                assert not self.open
                self.residency.check()


@pytest.mark.parametrize("policy", ["lru", "lfu", "ema", "ema+tokens", "belady"])
@pytest.mark.parametrize(("slots", "floor"), [(20, 0), (30, 4), (60, 3), (120, 4), (7, 1)])
def test_slots_pins_and_victims_agree_with_a_plain_model(policy, slots, floor):
    trace = routing(15, seed=slots)
    run = Run(make(policy, slots, trace, floor))
    run.steps(trace)
    assert run.residency.contents() == sorted(run.slot_of)
    events = run.residency.events
    assert events.hits + events.misses == 15 * 5 * 4
    assert events.misses - events.evictions == run.residency.resident


@pytest.mark.parametrize("policy", ["lru", "lfu", "ema", "ema+tokens", "belady"])
@pytest.mark.parametrize("slots", [1, 2, 3, 9, 40])
def test_a_sweep_of_many_tokens_reads_each_expert_once_in_file_order(policy, slots):
    trace = routing(6, seed=slots, tokens=17)
    residency = make(policy, slots, trace, floor=1, width=5)
    run = Run(residency)
    loads: list[int] = []
    start = run.start

    def note(decision: Decision) -> None:
        loads.extend(load.expert for load in decision.loads)
        start(decision)

    run.start = note  # type: ignore[method-assign]
    for step in trace:
        residency.begin_step([0] * 17)
        for layer, ids in enumerate(step):
            loads.clear()
            run.served = []
            residency.serve(layer, ids, run.start, run.finish)
            assert loads == sorted(set(loads))
            assert sorted(run.served) == sorted({e for row in ids for e in row})


def test_global_lru_is_textbook_lru():
    trace = routing(60, seed=3)
    slots = 50
    residency = make("lru", slots, trace)
    Run(residency).steps(trace)
    book: OrderedDict[tuple[int, int], None] = OrderedDict()
    hits = misses = 0
    for step in trace:
        for layer, ids in enumerate(step):
            wanted = sorted(ids[0])
            missing = [e for e in wanted if (layer, e) not in book]
            hits += len(wanted) - len(missing)
            misses += len(missing)
            for expert in wanted:
                if expert not in missing:
                    book.move_to_end((layer, expert))
            for expert in missing:
                if len(book) == slots:
                    book.popitem(last=False)
                book[layer, expert] = None
    # Experts of one layer share a time of use, so ties may be broken differently.
    assert abs(residency.events.hits - hits) <= 0.02 * (hits + misses)
    assert hits > 100


def test_lru_below_one_token_never_hits_and_a_floor_repairs_it():
    trace = [[[[0, 1, 2, 3]] for _ in range(5)]] * 10
    without = make("lru", 16, trace)
    Run(without).steps(trace)
    assert without.events.hits == 0
    with_floor = make("lru", 16, trace, floor=3)
    Run(with_floor).steps(trace)
    assert with_floor.events.hits > 80


@pytest.mark.parametrize("seed", range(6))
def test_belady_is_never_beaten(seed):
    trace = routing(30, seed=seed)
    for slots in (20, 33, 60):
        best = make("belady", slots, trace)
        Run(best).steps(trace)
        for policy in ("lru", "lfu", "ema", "ema+tokens"):
            for floor in (0, 4):
                other = make(policy, slots, trace, floor)
                Run(other).steps(trace)
                assert best.events.hits >= other.events.hits
        assert best.events.misses > 0


def test_the_floor_of_a_layer_survives_other_layers():
    residency = make("lfu", 25, [], floor=4)
    run = Run(residency)
    for _ in range(3):
        for layer in range(5):
            residency.serve(layer, [[0, 1, 2, 3]], run.start, run.finish)
    for n in range(40):
        residency.serve(0, [[(n + i) % 24 for i in range(4)]], run.start, run.finish)
    per_layer = [sum(layer == n for layer, _ in residency.contents()) for n in range(5)]
    assert per_layer[0] >= 5
    assert min(per_layer[1:]) >= 4


@pytest.mark.parametrize("policy", ["lru", "lfu", "ema", "ema+tokens"])
def test_a_prefill_sweep_does_not_flush_the_decode_set(policy):
    shape = CacheShape(layers=4, experts=64, top_k=4)
    hot = [[[0, 1, 2, 3]] for _ in range(4)]
    residency = make(policy, 40, [], floor=4, shape=shape)
    run = Run(residency)
    run.steps([hot] * 40)
    rng = random.Random(5)
    sweep = [[[*range(4)]] * 4 + [rng.sample(range(64), 4) for _ in range(60)] for _ in range(4)]
    run.steps([sweep])
    before = residency.events.misses
    run.steps([hot])
    kept = 16 - (residency.events.misses - before)
    assert kept >= 12


def test_a_failed_load_leaves_a_free_slot_and_a_usable_cache():
    residency = make("ema", 10, [], floor=1)
    run = Run(residency)
    run.steps(routing(3, seed=1))

    class Broken(Exception):
        pass

    decisions = []

    def fail(decision: Decision) -> None:
        decisions.append(decision)
        raise Broken

    wanted = [e for e in range(24) if residency.slot(2, e) < 0][:4]
    with pytest.raises(Broken):
        residency.serve(2, [wanted], decisions.append, fail)
    assert {load.expert for load in decisions[0].loads} == set(wanted)
    residency.abandon()
    residency.check()
    assert all(residency.slot(2, e) < 0 for e in wanted)
    assert residency.resident == 6
    run.slot_of = {key: residency.slot(*key) for key in residency.contents()}
    run.steps(routing(3, seed=2))


def test_prefetch_needs_a_victim_worth_less_and_can_be_withdrawn():
    residency = make("ema", 4, [], floor=0, shape=CacheShape(1, 8, 2))
    run = Run(residency)
    for _ in range(4):
        residency.serve(0, [[0, 1]], run.start, run.finish)
    residency.serve(0, [[2, 3]], run.start, run.finish)
    residency.policy.values[0, 7] = 0.0
    residency.begin_step([1])
    assert residency.prefetch(0, 7, worth=0.0) is None, "nothing resident is worth less"
    assert residency.prefetch(0, 0) is None, "already resident"
    residency.check()
    residency.policy.values[0, 7] = 0.5
    residency.policy.revision += 1
    load = residency.prefetch(0, 7)
    assert load is not None
    assert load.victim in (2, 3)
    residency.check()
    residency.cancelled(load.slot)
    residency.check()
    assert residency.slot(0, 7) < 0
    assert residency.slot(0, load.victim) == load.slot
    assert residency.events.evictions == 0
    load = residency.prefetch(0, 7)
    assert load is not None
    run.slot_of[0, 7] = load.slot
    decisions: list[Decision] = []
    residency.serve(0, [[7, 1]], decisions.append, lambda d: residency.loaded(load.slot))
    assert decisions[0].joins == [(7, load.slot)]
    assert residency.events.prefetch_late == 1
    residency.check()
    assert residency.events.prefetch_issued == 2


def test_unusable_settings_are_named():
    with pytest.raises(UsageError, match=r"known: .*lru"):
        create_policy("arc", SHAPE)
    with pytest.raises(UsageError, match="future"):
        create_policy("belady", SHAPE)
    for half_life in (0, -1.0, float("nan"), float("inf"), 10**400, True, "64"):
        with pytest.raises(UsageError, match="half_life is .*: it must be a number of tokens larger than 0"):
            create_policy("ema", SHAPE, half_life=half_life)
    for policy in ("lru", "lfu", "belady"):
        with pytest.raises(UsageError, match=rf"half_life is 8, and the policy {policy} has none; .*: ema, ema"):
            create_policy(policy, SHAPE, half_life=8)
    with pytest.raises(BudgetError, match="1 slot"):
        Residency(create_policy("lru", SHAPE), 0, floor=1)


def test_a_held_slot_is_no_victim_until_it_is_let_go():
    residency = make_held()
    slot = residency.slot(0, 0)
    for hold in range(2):
        residency.hold(slot)
        residency.check()
        assert residency.is_pinned(slot)
        assert {load.slot for load in demand(residency, [5 + 4 * hold, 6 + 4 * hold])} == set(range(3)) - {slot}
        residency.check()
    residency.let_go(slot)
    assert residency.is_pinned(slot)
    residency.let_go(slot)
    residency.check()
    assert slot in {load.slot for load in demand(residency, [1, 2, 3])}


def test_a_slot_stays_held_beyond_the_release_of_its_decision():
    residency = make_held()
    slot = residency.slot(0, 0)
    residency.serve(0, [[0]], lambda _: None, lambda _: residency.hold(slot))
    residency.check()
    assert residency.prefetch(0, 7, worth=100.0) is not None
    assert residency.slot(0, 0) == slot
    residency.abandon()
    residency.check()
    assert not residency.is_pinned(slot)


def test_when_every_slot_is_held_somebody_must_let_go():
    residency = make_held()
    for slot in range(3):
        residency.hold(slot)
    asked = []

    def let_go():
        asked.append(len(asked))
        residency.let_go(asked[-1])

    served = []

    def finish(decision):
        served.extend(load.expert for load in decision.loads)
        for load in decision.loads:
            residency.loaded(load.slot)

    residency.complete(residency.open(0, [5, 6], lambda _: None), lambda _: None, finish, let_go)
    residency.check()
    assert served == [5, 6]
    assert asked == [0]


def make_held():
    residency = Residency(create_policy("lfu", CacheShape(1, 12, 2)), 3, floor=0)
    demand(residency, [0, 1])
    demand(residency, [2])
    return residency


def demand(residency, experts):
    """Serve `experts` at once; the loads it took."""
    loads = []

    def finish(decision):
        loads.extend(decision.loads)
        for load in decision.loads:
            residency.loaded(load.slot)

    residency.serve(0, [experts], lambda _: None, finish)
    return loads


def test_values_that_another_tier_changed_count_for_the_next_victim():
    """Two tiers follow one policy; what it learns through the first one may change values of any layer."""
    residency = make("ema", 4, [], shape=CacheShape(2, 8, 2))
    for layer in (0, 1):
        residency.serve(layer, [[0, 1]], lambda decision: None, lambda decision: _loaded(residency, decision))
    values = residency.policy.values
    values[:] = 0.0
    values[0, 0] = -1.0
    values[1, 5] = 9.0
    residency.policy.revision += 1
    load = residency.prefetch(1, 5)
    assert load is not None and divmod(load.victim, 8) == (0, 0)
    residency.loaded(load.slot)
    values[0, 1] = 7.0
    residency.policy.revision += 1
    residency.check()


def _loaded(residency: Residency, decision: Decision) -> None:
    for load in decision.loads:
        residency.loaded(load.slot)


@pytest.mark.parametrize("policy", ["lru", "ema+tokens"])
def test_after_an_interrupt_anywhere_only_what_has_arrived_is_resident(policy, interrupted):
    """A resident expert is what was read last into its slot, wherever the step broke off."""
    residency = make(policy, 12, [], floor=1, width=4)
    bytes_of: dict[int, tuple[int, int]] = {}
    shape, rng = residency.shape, random.Random(3)

    def finish(decision):
        for load in decision.loads:
            bytes_of[load.slot] = decision.layer, load.expert
            residency.loaded(load.slot)

    def step():
        residency.begin_step([rng.randrange(9)])
        for layer in range(shape.layers):
            load = residency.prefetch(layer, rng.randrange(shape.experts))
            residency.serve(layer, [rng.sample(range(shape.experts), shape.top_k)], lambda _: None, finish)
            if load is not None and rng.random() < 0.5 and residency.is_loading(load.slot):
                residency.cancelled(load.slot)
            elif load is not None and residency.is_loading(load.slot):
                residency.failed(load.slot)

    interrupts = 0
    for at in range(1, 900):
        interrupts += interrupted(step, at, "cache/residency.py", "cache/victims.py")
        residency.abandon()
        residency.check()
        for layer, expert in residency.contents():
            assert bytes_of[residency.slot(layer, expert)] == (layer, expert)
    assert interrupts > 200
