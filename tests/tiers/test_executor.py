"""Paged experts give the bits of resident experts, whatever the cache and the disk do."""

from __future__ import annotations

import itertools
import random
import time

import numpy as np
import pytest
import torch
from paging_samples import EXPERTS, FIRST, LAYERS, TOP_K, Unruly, make_store, random_steps

from offload.cache.arrays import load_arrays
from offload.cache.policy import HALF_LIVES
from offload.cache.simulator import replay
from offload.cache.trace import Trace
from offload.errors import BudgetError, DiskError
from offload.kernels import select
from offload.tiers.disk import DiskReader
from offload.tiers.executor import Executor
from offload.tiers.ram import RamTier
from offload.types import ExpertId

LENGTHS = [1, 1, 7, 1, 1, 23, 1, 1, 1]


@pytest.fixture(scope="module")
def kernels():
    return select("reference")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("int4"), "int4-g32")


def reference(store, kernels, steps):
    """All layers with every expert at hand."""
    outputs = []
    for step in steps:
        for layer, (x, ids, weights) in enumerate(step):
            partial = torch.zeros(ids.numel(), x.shape[1])
            for expert in ids.unique().tolist():
                raw = store.bytes_of(ExpertId(FIRST + layer, expert))
                buffer = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
                positions = (ids.reshape(-1) == expert).nonzero().reshape(-1)
                kernels.experts(x, [(store.layout.views(buffer), positions)], ids.shape[1], partial)
            outputs.append(kernels.combine(partial, ids, weights))
    return outputs


def run(executor, steps):
    outputs = []
    for number, step in enumerate(steps):
        executor.begin_step([number] * len(step[0][0]))
        for layer, (x, ids, weights) in enumerate(step):
            if (number + layer) % 2:
                executor.hint(FIRST + layer, ids, weights)
            outputs.append(executor(FIRST + layer, x, ids, weights))
            executor.ram.residency.check()
    return outputs


def make(store, kernels, slots, system=None, **options):
    reader = DiskReader(threads=3, part_nbytes=4096, backoff_s=0.0005, system=system or Unruly())
    options = {"prefetch": False} | options
    return Executor(store, kernels, slots=slots, allow_slow=True, max_tokens=23, reader=reader, **options)


DISKS = {
    "plain": {},
    "slow": {"delay_s": 0.002},
    "short": {"short": 0.3, "seed": 1},
    "eio": {"fail": 0.1, "seed": 2},
}


POLICIES = ["lru", "lfu", "ema", "ema+tokens"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("disk", list(DISKS))
def test_outputs_do_not_depend_on_cache_or_disk(store, kernels, policy, disk):
    check_outputs(store, kernels, policy, disk, (1, 5, 14, 36))


@pytest.mark.parametrize(("codec", "lead"), [("bf16", 4096), ("bf16", 8), ("int8-g32", 840), ("fp8", 64)])
def test_outputs_do_not_depend_on_the_layout(kernels, codec, lead, tmp_path):
    check_outputs(make_store(tmp_path, codec, lead=lead), kernels, "ema", "short", (2, 9))


def check_outputs(store, kernels, policy, disk, sizes):
    steps = random_steps(store, LENGTHS)
    expected = reference(store, kernels, steps)
    used = [{e for step in steps for e in step[layer][1].unique().tolist()} for layer in range(LAYERS)]
    for slots in sizes:
        executor = make(store, kernels, slots, Unruly(**DISKS[disk]), policy=policy)
        for ours, right in zip(run(executor, steps), expected, strict=True):
            assert torch.equal(ours, right)
        ram = executor.counters().ram
        assert ram.hits + ram.misses == sum(len(ids.unique()) for step in steps for _, ids, _ in step)
        assert ram.reads == ram.misses
        assert ram.bytes_read == ram.misses * store.layout.stride
        assert (ram.evictions == 0) == (slots == 36)
        assert (ram.misses == sum(map(len, used))) == (slots == 36)
        executor.close()


@pytest.mark.parametrize("slots", [1, 4, 10, 20])
def test_a_live_run_replayed_gives_the_same_events(store, kernels, slots, tmp_path):
    for policy, half_life in (("lru", None), ("ema", None), ("ema", 1.5), ("ema+tokens", None), ("ema+tokens", 3)):
        system = Unruly(delay_s=0.002)
        executor = make(store, kernels, slots, system, policy=policy, half_life=half_life, record=True)
        executor.begin_session()
        run(executor, random_steps(store, LENGTHS, seed=slots))
        executor.trace().save(tmp_path / "t.npz")
        trace = Trace.load(tmp_path / "t.npz")
        result = replay(trace, trace.header["policy"], trace.header["slots"])
        assert vars(result.events) == trace.header["events"] == vars(executor.ram.residency.events)
        assert result.events.misses > 10
        executor.close()


def repeating(store, count):
    """Steps in which a token id always calls for the same experts, and their token ids."""
    kinds = [random_steps(store, [1], seed=100 + n)[0] for n in range(6)]
    ids = [(7 * n) % 6 if n % 3 else n % 6 for n in range(count)]
    return ids, [kinds[n] for n in ids]


@pytest.mark.parametrize("delay_s", [0.0, 0.003])
def test_prefetch_changes_no_bits_and_is_replayed(store, kernels, delay_s, tmp_path):
    ids, steps = repeating(store, 60)
    expected = reference(store, kernels, steps)
    executor = make(store, kernels, 16, Unruly(delay_s=delay_s), policy="ema+tokens", prefetch=True, record=True)
    outputs = []
    for token, step in zip(ids, steps, strict=True):
        executor.begin_step([token])
        for layer, (x, experts, weights) in enumerate(step):
            time.sleep(delay_s)  # attention, during which the drive idles
            outputs.append(executor(FIRST + layer, x, experts, weights))
            executor.ram.residency.check()
    for ours, right in zip(outputs, expected, strict=True):
        assert torch.equal(ours, right)
    events = executor.ram.residency.events
    assert events.prefetch_issued > 10
    assert events.prefetch_useful + events.prefetch_late > 0.8 * events.prefetch_issued - 4
    ram = executor.counters().ram
    assert ram.reads + len(executor.ram._reads) == ram.misses + events.prefetch_issued - events.prefetch_cancelled
    assert "prefetch" in executor.ram.telemetry.summary()
    executor.trace().save(tmp_path / "t.npz")
    trace = Trace.load(tmp_path / "t.npz")
    assert vars(replay(trace, "ema+tokens", 16).events) == trace.header["events"]
    assert replay(trace, "ema+tokens", 15).events.prefetch_issued == 0
    executor.close()


@pytest.mark.parametrize(("depth", "reach"), [(0, 3), (1, 3), (2, 3), (5, 5), (8, 7)])
def test_reads_ahead_reach_as_far_as_routers_are_applied_early(kernels, depth, reach, tmp_path):
    """After the first of eight layers one expert of every later layer is expected."""
    deep = make_store(tmp_path, layers=8)
    executor = make(deep, kernels, 90, policy="ema", prefetch=True, prefetch_depth=depth)
    executor.begin_step([0])
    assert executor.lookahead() == depth
    x, ids, weights = random_steps(deep, [1])[0][0]
    executor(FIRST, x, ids, weights)
    for layer in range(1, 8):
        executor.expect(FIRST + layer, [layer])
        while executor.ram._reads:  # the drive idles again
            executor.ram._collect(wait=True)
        executor.ram._settle(executor.ram._ahead)
    residency = executor.ram.residency
    assert [layer for layer in range(1, 8) if residency.slot(layer, layer) >= 0] == list(range(1, 1 + reach))
    executor.close()


@pytest.mark.parametrize("seed", range(6))
def test_runs_with_any_settings_give_the_same_bits_and_replay_exactly(store, kernels, seed, tmp_path):
    rng = random.Random(seed)
    steps = random_steps(store, [rng.choice([1, 1, 1, 2, 9]) for _ in range(16)], seed=seed)
    slots, policy = rng.randrange(1, LAYERS * EXPERTS + 1), rng.choice(POLICIES)
    system = Unruly(delay_s=rng.choice([0.0, 0.002]), short=0.1, fail=0.02, seed=seed)
    half_life = 2.0 + seed if policy in HALF_LIVES else None
    options = {"policy": policy, "half_life": half_life, "prefetch": True, "prefetch_depth": seed, "record": True}
    executor = make(store, kernels, slots, system, **options)
    outputs = []
    for number, step in enumerate(steps):
        if rng.random() < 0.1:
            executor.begin_session()
        executor.begin_step([number % 5] * len(step[0][0]))
        for layer, (x, ids, weights) in enumerate(step):
            if rng.random() < 0.5:
                executor.hint(FIRST + layer, ids, weights)
            outputs.append(executor(FIRST + layer, x, ids, weights))
            for later in range(layer + 1, min(layer + 1 + executor.lookahead(), LAYERS)):
                truth = step[later][1][0].tolist()  # as good as a router applied early: right two times of three
                executor.expect(FIRST + later, [truth[0], truth[1], rng.randrange(EXPERTS)])
            executor.ram.residency.check()
    assert all(map(torch.equal, outputs, reference(store, kernels, steps)))
    executor.trace().save(tmp_path / "t.npz")
    trace = Trace.load(tmp_path / "t.npz")
    assert vars(replay(trace, policy, slots).events) == trace.header["events"] == vars(executor.ram.residency.events)
    right = trace.header["foretold_right"]
    assert right is None or 0.5 < right < 0.9
    telemetry = trace.header["telemetry"]
    assert telemetry["ram"]["misses"] == trace.header["events"]["misses"] and len(telemetry["layer_stall_s"]) == LAYERS
    executor.close()


def test_what_is_missing_is_queued_before_anything_is_computed(store, kernels):
    system, computed = Unruly(), []

    class Watched:
        combine = staticmethod(kernels.combine)

        def experts(self, x, wave, k, partial):
            computed.append((len(wave), executor.reader_load()))
            kernels.experts(x, wave, k, partial)
            system.gate.set()

    executor = make(store, Watched(), 36, system)
    executor.reader_load = lambda: len(executor.ram._reads)
    x, weights = torch.randn(1, 64), torch.ones(1, TOP_K)
    executor.begin_step([0])
    executor(FIRST, x, torch.tensor([[0, 1, 2]]), weights)
    computed.clear()
    system.gate.clear()
    executor.begin_step([0])
    executor(FIRST, x, torch.tensor([[5, 1, 7]]), weights)
    assert computed[0] == (1, 2)  # the resident one first, with both missing ones under way
    executor.close()


def test_failing_prefetches_do_no_harm(store, kernels):
    ids, steps = repeating(store, 40)
    expected = reference(store, kernels, steps)
    system = Unruly()
    executor = make(store, kernels, 14, system, policy="ema+tokens", prefetch=True)
    got = []
    for number, (token, step) in enumerate(zip(ids, steps, strict=True)):
        if number == 20:
            system.broken.add(str(store.path / f"{FIRST + 2}.bin"))
        executor.begin_step([token])
        time.sleep(0.03)  # whatever was begun on speculation has failed by now
        system.broken.clear()
        for layer, (x, experts, weights) in enumerate(step):
            got.append(executor(FIRST + layer, x, experts, weights))
            executor.ram.residency.check()
    for ours, right in zip(got, expected, strict=True):
        assert torch.equal(ours, right)
    executor.close()


def test_what_was_learned_warms_the_next_start(store, kernels, tmp_path):
    usage = tmp_path / "usage.npz"
    ids, steps = repeating(store, 60)

    def misses():
        executor = make(store, kernels, 12, policy="ema+tokens", usage=usage)
        for token, step in zip(ids[:30], steps[:30], strict=True):
            executor.begin_step([token])
            for layer, (x, experts, weights) in enumerate(step):
                executor(FIRST + layer, x, experts, weights)
        executor.close()
        return executor.ram.residency.events.misses

    cold = misses()
    assert usage.exists()
    assert misses() < cold


@pytest.mark.parametrize("policy", POLICIES)
def test_with_a_slot_for_every_expert_learning_waits_for_the_end_of_the_step(store, policy, tmp_path):
    """The usage file is that of a tier which learns from every layer, broken steps and long passes included."""
    steps = [[ids.tolist() for _, ids, _ in step] for step in random_steps(store, LENGTHS * 3)]
    tiers = [
        RamTier(store, slots=LAYERS * EXPERTS, policy=policy, usage=tmp_path / name, followed=followed)
        for name, followed in (("each.npz", True), ("later.npz", False))
    ]
    for tier in tiers:
        for number, step in enumerate(steps):
            tier.begin_step([number % 5] * len(step[0]))
            for layer, routing in enumerate(step):
                chosen = sorted({expert for row in routing for expert in row})
                breaks_off = number % 6 == 4 and layer == 1
                if all(tier.residents().slots[layer, chosen] >= 0) and not breaks_off:
                    tier.ran(layer, routing)
                    continue
                assert tier.begin_layer(layer, routing) == chosen
                if breaks_off:
                    tier.abandon()
                    break
                tier.complete(tier.open(layer, chosen), lambda pairs: None)
                tier.end_layer()
            tier.residency.check()
        tier.close()
    each, later = tiers
    assert vars(later.residency.events) == vars(each.residency.events)
    assert (tmp_path / "later.npz").exists() == policy.startswith("ema")
    if policy.startswith("ema"):
        ours, theirs = load_arrays(tmp_path / "later.npz"), load_arrays(tmp_path / "each.npz")
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_a_dead_disk_is_an_error_and_the_executor_survives_it(store, kernels):
    steps = random_steps(store, LENGTHS)
    expected = reference(store, kernels, steps)
    system = Unruly(delay_s=0.001)
    executor = make(store, kernels, 10, system)
    run(executor, steps[:2])
    system.broken.add(str(store.path / f"{FIRST + 1}.bin"))
    with pytest.raises(DiskError, match=rf"expert \d+ of layer {FIRST + 1} .*Input/output error") as caught:
        run(executor, steps)
    assert str(store.path / f"{FIRST + 1}.bin") in str(caught.value)
    executor.ram.residency.check()
    assert executor.ram.reader.idle
    system.broken.clear()
    for ours, right in zip(run(executor, steps), expected, strict=True):
        assert torch.equal(ours, right)
    executor.close()


def test_an_exception_while_computing_leaves_the_executor_usable(store, kernels):
    steps = random_steps(store, LENGTHS)
    expected = reference(store, kernels, steps)
    fuse = itertools.count()

    class Fragile:
        combine = staticmethod(kernels.combine)

        def experts(self, *arguments):
            if next(fuse) == 9:
                raise KeyboardInterrupt
            kernels.experts(*arguments)

    executor = make(store, Fragile(), 8, Unruly(delay_s=0.003))
    with pytest.raises(KeyboardInterrupt):
        run(executor, steps)
    for ours, right in zip(run(executor, steps), expected, strict=True):
        assert torch.equal(ours, right)
    executor.close()


def test_a_step_that_stops_after_a_hint_is_forgotten(store, kernels):
    steps = random_steps(store, LENGTHS)
    executor = make(store, kernels, 8, Unruly(delay_s=0.003))
    executor.begin_step([0])
    executor.hint(FIRST, steps[0][0][1], steps[0][0][2])
    for ours, right in zip(run(executor, steps), reference(store, kernels, steps), strict=True):
        assert torch.equal(ours, right)
    executor.close()


def test_hits_are_computed_before_misses_arrive(store, kernels):
    system = Unruly()
    computed = []

    class Watched:
        combine = staticmethod(kernels.combine)

        def experts(self, x, wave, k, partial):
            computed.append(len(wave))
            kernels.experts(x, wave, k, partial)
            system.gate.set()

    executor = make(store, Watched(), 36, system)
    x, weights = torch.randn(1, 64), torch.ones(1, TOP_K)
    executor.begin_step([0])
    executor(FIRST, x, torch.tensor([[0, 1, 2]]), weights)
    computed.clear()
    system.gate.clear()
    executor.begin_step([0])
    executor(FIRST, x, torch.tensor([[5, 1, 2]]), weights)  # would hang if the hits waited
    assert computed == [2, 1]
    executor.close()


def test_a_budget_below_one_token_is_refused_with_the_numbers(store, kernels):
    need = LAYERS * TOP_K
    text = rf"{need - 1} experts .*{need} \({LAYERS} layers x top-{TOP_K}.*--ram.*--allow-slow"
    with pytest.raises(BudgetError, match=text):
        Executor(store, kernels, slots=need - 1)
    with pytest.raises(BudgetError, match="larger --ram"):
        Executor(store, kernels, slots=0, allow_slow=True)
    executor = Executor(store, kernels, slots=10**6)
    assert executor.ram.residency.slots == LAYERS * EXPERTS
    executor.close()


def test_prefill_reads_each_expert_at_most_once_per_chunk(store, kernels):
    for slots in (2, 9, 20):
        executor = make(store, kernels, slots)
        (step,) = random_steps(store, [23])
        executor.begin_step([0] * 23)
        for layer, (x, ids, weights) in enumerate(step):
            before = executor.counters().ram.reads
            executor(FIRST + layer, x, ids, weights)
            assert executor.counters().ram.reads - before <= len(ids.unique())
        executor.close()
