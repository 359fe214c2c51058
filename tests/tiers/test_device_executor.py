"""Experts paged through VRAM give the bits of resident experts, whatever the device does with its queues."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from paging_samples import EXPERTS, FIRST, LAYERS, TOP_K, Unruly, make_store, random_steps
from test_executor import reference, repeating

from offload.cache.lookahead import EARLY_ROUTERS
from offload.cache.split import Rates
from offload.errors import DeviceError, DiskError
from offload.kernels import select
from offload.kernels.native_library import available
from offload.kernels.reference_device import ReferenceDeviceKernels
from offload.tiers.device_executor import DeviceExecutor, DeviceShare
from offload.tiers.disk import DiskReader
from offload.tiers.simulated import SimulatedDevice
from offload.tiers.vram_memory import lent_slots

LENGTHS = [1, 1, 7, 1, 1, 23, 1, 1, 1]
NATIVE = pytest.param("native", marks=pytest.mark.skipif(available() is not None, reason="no compiled kernels here"))
ALL = LAYERS * EXPERTS


@pytest.fixture(scope="module")
def kernels():
    torch.set_num_threads(1)
    return ReferenceDeviceKernels()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("experts"), "int4-g32")


@pytest.fixture(scope="module")
def steps(store):
    return random_steps(store, LENGTHS)


@pytest.fixture(scope="module")
def expected(store, kernels, steps):
    return reference(store, kernels, steps)


def make(store, kernels, vram, ram, *, seeds=(None,), system=None, lend=False, **options):
    """An executor whose layers are shared out among as many devices as there are seeds."""
    reader = DiskReader(threads=3, part_nbytes=4096, backoff_s=0.0005, system=system or Unruly())
    devices = [SimulatedDevice(seed=seed, name=f"device {n}") for n, seed in enumerate(seeds)]
    bounds = [round(LAYERS * n / len(devices)) for n in range(len(devices) + 1)]
    shares = [
        DeviceShare(device, kernels, range(FIRST + bounds[n], FIRST + bounds[n + 1]), vram, lend)
        for n, device in enumerate(devices)
    ]
    options = {"prefetch": False, "allow_slow": True, "policy": "ema"} | options
    executor = DeviceExecutor(store, shares, slots=ram, max_tokens=23, reader=reader, **options)
    watch_reads(executor)
    for device in devices:
        device.seal()
    return executor


def watch_reads(executor):
    """Reading from the drive into a RAM slot is an access by the host, which must not meet a copy."""
    pool = executor.ram.pool
    buffer = pool.buffer

    def checked(slot):
        for tier in executor.tiers:
            tier.device.host_access(pool.tensor(slot), write=True)
        return buffer(slot)

    pool.buffer = checked


def run(executor, steps, tokens=None):
    outputs = []
    for number, step in enumerate(steps):
        executor.begin_step(tokens[number : number + 1] if tokens else [number] * len(step[0][0]))
        if len(step[0][0]) == 1 and number % 3:
            outputs += looked_up(executor, step)
            continue
        for layer, (x, ids, weights) in enumerate(step):
            if (number + layer) % 2:
                executor.hint(FIRST + layer, ids, weights)
            outputs.append(executor(FIRST + layer, x, ids, weights).clone())
            check(executor)
    return outputs


def looked_up(executor, step, guess=lambda: False):
    """Outputs of a step of one token whose present experts the device looks up in its table, as recordings do."""
    outputs = []
    for layer, (x, ids, weights) in enumerate(step):
        if guess():
            executor.expect(FIRST + layer, ids[0].tolist())
        device = executor._desks[layer].tier.device
        executor.send(FIRST + layer, ids)
        with device.guard():
            device.record(partial(executor.present, FIRST + layer, x, ids))()
        executor.complete(FIRST + layer, x)
        check(executor)
        with device.guard():
            outputs.append(device.call(partial(executor.combined, FIRST + layer, ids, weights)))
    return outputs


def check(executor):
    executor.ram.residency.check()
    for tier in executor.tiers:
        tier.residency.check()


def assert_same(outputs, expected):
    assert len(outputs) == len(expected)
    for number, (ours, right) in enumerate(zip(outputs, expected, strict=True)):
        assert torch.equal(ours, right), f"output {number} differs"


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("ram", [2, 5, 20])
@pytest.mark.parametrize("vram", [2, 3, 14, ALL])
def test_outputs_do_not_depend_on_budgets_or_timing(store, kernels, steps, expected, vram, ram, seed):
    executor = make(store, kernels, vram, ram, seeds=[seed])
    assert_same(run(executor, steps), expected)
    telemetry = executor.counters()
    demanded = sum(len(ids.unique()) for step in steps for _, ids, _ in step)
    assert telemetry.vram.hits + telemetry.vram.misses == demanded
    assert telemetry.ram.hits + telemetry.ram.misses == telemetry.vram.misses
    with executor.tiers[0].device.guard():
        executor.tiers[0].settle()
    assert executor.counters().vram.reads == telemetry.vram.misses
    assert (telemetry.vram.evictions == 0) == (vram == ALL)
    executor.close()


@pytest.mark.parametrize("seed", [3, 4])
def test_several_devices_share_one_ram_tier(store, kernels, steps, expected, seed):
    for ram in (2, 12):
        executor = make(store, kernels, 4, ram, seeds=[seed, None, seed + 10])
        assert [tier.layers for tier in executor.tiers] == [range(1), range(1, 2), range(2, 3)]
        assert_same(run(executor, steps), expected)
        assert all(tier.device.bytes_copied for tier in executor.tiers)
        executor.close()


@pytest.mark.parametrize(("codec", "lead"), [("bf16", 4096), ("int8-g32", 832), ("fp8", 64)])
def test_outputs_do_not_depend_on_the_layout(kernels, codec, lead, tmp_path):
    store = make_store(tmp_path, codec, lead=lead)
    steps = random_steps(store, [1, 7, 1])
    executor = make(store, kernels, 3, 7, seeds=[5], system=Unruly(short=0.3, seed=1))
    assert_same(run(executor, steps), reference(store, kernels, steps))
    executor.close()


@pytest.mark.parametrize("seed", [None, 2])
@pytest.mark.parametrize(("tokens", "sweeps"), [(23, True), (15, False)])
def test_a_long_pass_copies_what_the_next_layer_will_need(store, kernels, tokens, sweeps, seed):
    """From four positions per expert on; the bits are those of a pass that waits for every expert."""
    steps = random_steps(store, [tokens] * 3)
    executor = make(store, kernels, 20, ALL, seeds=[seed], prefetch=True)
    assert_same(run(executor, steps), reference(store, kernels, steps))
    executor.begin_step([0])
    vram = executor.counters().vram
    assert (vram.prefetch_issued > 0) == (vram.prefetch_useful + vram.prefetch_late > 0) == sweeps
    assert vram.prefetch_wasted <= vram.prefetch_issued // 4
    executor.close()


@pytest.mark.parametrize("policy", ["ema", "ema+tokens"])
@pytest.mark.parametrize("seed", [None, 7])
def test_promotion_changes_no_bits_and_raises_hits(store, kernels, policy, seed):
    ids, steps = repeating(store, 40)
    expected = reference(store, kernels, steps)
    hits = []
    for prefetch in (False, True):
        executor = make(store, kernels, 16, 30, seeds=[seed], policy=policy, prefetch=prefetch)
        assert_same(run(executor, steps, ids), expected)
        vram = executor.counters().vram
        assert vram is not None
        hits.append(vram.hits)
        assert (vram.prefetch_issued > 0) == prefetch
        executor.close()
    if policy == "ema+tokens":
        assert hits[1] > hits[0]


@pytest.mark.parametrize(
    ("vram", "ram", "seed"),
    # A device that does nothing before it is waited for leaves the link no idle moment.
    [(6, 12, None), (6, 12, 7), (6, 12, 8), (12, ALL, 7), (12, ALL, 8)],
)
@pytest.mark.parametrize("depth", [EARLY_ROUTERS, LAYERS - 1])
def test_routers_applied_early_change_no_bits_and_save_demands(store, kernels, vram, ram, seed, depth):
    steps = random_steps(store, [1] * 30)
    expected = reference(store, kernels, steps)
    misses = []
    for foreseen in (False, True):
        executor = make(store, kernels, vram, ram, seeds=[seed], prefetch=True, prefetch_depth=depth)
        outputs = []
        for number, step in enumerate(steps):
            executor.begin_step([number])
            for layer, (x, ids, weights) in enumerate(step):
                executor.hint(FIRST + layer, ids, weights)
                later = range(layer + 1, min(layer + 1 + executor.foresight(), LAYERS))
                if foreseen and later:
                    executor.foresee([FIRST + at for at in later], torch.cat([step[at][1] for at in later]))
                outputs.append(executor(FIRST + layer, x, ids, weights).clone())
                check(executor)
        assert_same(outputs, expected)
        executor.begin_step([0])
        counters = executor.counters()
        missed = counters.vram.misses if ram == ALL else counters.ram.misses
        misses.append(missed)
        executor.close()
    # Even one layer ahead is early enough: the choices are taken up behind the sum of the layer before.
    assert misses[1] < misses[0]


@pytest.mark.parametrize("depth", [0, EARLY_ROUTERS, 2, 8])
def test_nothing_is_foreseen_where_nothing_is_missing(store, kernels, depth):
    executor = make(store, kernels, ALL, ALL, prefetch=True, prefetch_depth=depth)
    assert executor.early_routers == executor.foresight() == 0
    executor.close()
    executor = make(store, kernels, 4, ALL, prefetch=True, prefetch_depth=depth)
    assert executor.early_routers == depth
    for tokens, count in (([1], depth), ([1, 2, 3], 0)):
        executor.begin_step(tokens)
        assert executor.foresight() == count
    executor.close()


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize(("vram", "ram"), [(3, 4), (9, 30)])
@pytest.mark.parametrize("cpu", [1e3, 2e5, 1e9])
@pytest.mark.parametrize("below", ["reference", NATIVE])
def test_experts_computed_in_place_join_the_sum(store, kernels, steps, expected, below, cpu, vram, ram, seed):
    executor = make(store, kernels, vram, ram, seeds=[seed, None], below=select(below))
    for tier in executor.tiers:
        tier.split.rates = Rates(1e5, 1e9, cpu, 1e9)
    outputs = run(executor, steps)
    if below == "reference":  # these have the bits of the simulated device's kernels, so even the split changes none
        assert_same(outputs, expected)
    for ours, right in zip(outputs, expected, strict=True):
        # The compiled kernels round inputs to int8; 3% of the largest output is far from another expert's.
        torch.testing.assert_close(ours, right, rtol=0, atol=0.03 * float(right.abs().max()))
    telemetry = executor.counters()
    short = sum(len(ids.unique()) for step in steps for _, ids, _ in step if len(ids) == 1)
    demanded = sum(len(ids.unique()) for step in steps for _, ids, _ in step)
    assert telemetry.vram.hits + telemetry.vram.misses + telemetry.computed_in_ram == demanded
    assert telemetry.computed_in_ram <= short
    assert (telemetry.computed_in_ram > 0) == (cpu > 1e3)
    executor.close()


@pytest.mark.parametrize("seed", [None, 6])
@pytest.mark.parametrize("vram", [8, 14])
def test_long_passes_borrow_slots_and_give_them_back(store, kernels, steps, expected, vram, seed):
    executor = make(store, kernels, vram, 20, seeds=[seed], lend=True, prefetch=True)
    (tier,) = executor.tiers
    lent = lent_slots(store.layout, 23, TOP_K)
    assert 0 < lent <= vram - 2
    for number, (step, right) in enumerate(zip(steps, zip(*[iter(expected)] * LAYERS, strict=True), strict=True)):
        assert_same(run(executor, [step]), right)
        tokens = len(step[0][0])
        borrowed = vram - lent if tokens > 8 else vram
        assert tier.residency.resident <= borrowed
        assert (tier.partial(tokens * TOP_K).data_ptr() >= tier.slab.data.data_ptr()) or tokens <= 8
        assert number < 6 or tokens > 8 or tier.residency.resident > vram - lent  # they hold experts again
    assert LENGTHS[5] == 23
    executor.close()


def test_slots_are_lent_even_while_all_experts_are_resident(store, kernels, steps, expected):
    executor = make(store, kernels, ALL, ALL, seeds=[4], lend=True)
    executor.preload()
    (tier,) = executor.tiers
    for number, (step, right) in enumerate(zip(steps, zip(*[iter(expected)] * LAYERS, strict=True), strict=True)):
        assert tier.complete or number > 5
        assert_same(run(executor, [step]), right)
    assert LENGTHS[5] == 23 and tier.residency.resident < ALL  # what was lent has to be read again
    executor.close()


def test_everything_resident_needs_no_ids_on_the_host(store, kernels, steps, expected):
    executor = make(store, kernels, ALL, ALL, seeds=[1, 2])
    executor.preload()
    assert all(tier.complete for tier in executor.tiers)
    copied = [tier.device.bytes_copied for tier in executor.tiers]
    assert sum(copied) == ALL * store.layout.stride + ALL * 4  # and the table of slots
    for tier in executor.tiers:
        tier.device.compute.copy = None  # ids would go this way
    assert_same(run(executor, steps), expected)
    assert [tier.device.bytes_copied for tier in executor.tiers] == copied
    assert executor.counters().ram.reads == ALL
    executor.close()


def test_a_dead_disk_is_an_error_and_the_executor_survives_it(store, kernels, steps, expected):
    system = Unruly(delay_s=0.001)
    executor = make(store, kernels, 5, 10, seeds=[1, 2], system=system)
    run(executor, steps[:2])
    system.broken.add(str(store.path / f"{FIRST + 1}.bin"))
    with pytest.raises(DiskError, match=rf"expert \d+ of layer {FIRST + 1} "):
        run(executor, steps)
    check(executor)
    system.broken.clear()
    assert_same(run(executor, steps), expected)
    executor.close()


@pytest.mark.parametrize("fuse", [0, 3, 8, 21])
def test_an_exception_while_computing_leaves_the_executor_usable(store, kernels, steps, expected, fuse):
    class Fragile(ReferenceDeviceKernels):
        left = fuse

        def slot_experts(self, *arguments):
            self.burn()
            super().slot_experts(*arguments)

        def group_experts(self, *arguments):
            self.burn()
            super().group_experts(*arguments)

        def burn(self):
            self.left -= 1
            if self.left == -1:
                raise KeyboardInterrupt

    executor = make(store, Fragile(), 4, 8, seeds=[fuse])
    with pytest.raises(KeyboardInterrupt):
        run(executor, steps)
    check(executor)
    assert_same(run(executor, steps), expected)
    executor.close()


def test_a_step_that_stops_after_a_hint_is_forgotten(store, kernels, steps, expected):
    executor = make(store, kernels, 5, 9, seeds=[1])
    executor.begin_step([0])
    executor.hint(FIRST, steps[5][0][1], steps[5][0][2])
    assert_same(run(executor, steps), expected)
    executor.close()


def test_a_lost_device_ends_in_an_error_that_says_so(store, kernels, steps):
    executor = make(store, kernels, 5, 9, seeds=[1])
    run(executor, steps[:3])
    executor.tiers[0].device.lost = True
    for _ in range(2):
        with pytest.raises(DeviceError, match="device 0 failed"):
            run(executor, steps[3:4])
    executor.close()


def test_hits_are_queued_before_misses_arrive(store, kernels):
    system = Unruly()

    class Watched(ReferenceDeviceKernels):
        def slot_experts(self, slab, x, slots, partial):
            computed.append(int((slots >= 0).sum()))
            super().slot_experts(slab, x, slots, partial)
            system.gate.set()

    computed = []
    executor = make(store, Watched(), ALL, ALL, system=system)
    x, weights = torch.randn(1, 64), torch.ones(1, TOP_K)
    executor.begin_step([0])
    executor(FIRST, x, torch.tensor([[0, 1, 2]]), weights)
    computed.clear()
    system.gate.clear()
    stream = executor.tiers[0].device.compute
    stream.launch = lambda work, **_: (stream.drain(), work())  # a device as fast as its host
    executor.begin_step([0])
    executor(FIRST, x, torch.tensor([[5, 1, 2]]), weights)  # would hang if the hits waited
    assert computed == [2, 1]
    executor.close()


def test_the_device_gets_its_work_in_the_order_of_its_needs_and_books_are_kept_behind_it(store):
    """Copies of what lies in RAM before kernels of hits, all of them before the sum, and only then speculation."""
    done: list[object] = []

    class Watched(ReferenceDeviceKernels):
        def combine(self, *arguments):
            done.append("sum")
            return super().combine(*arguments)

    executor = make(store, Watched(), ALL, ALL, prefetch=True)
    (tier,) = executor.tiers
    executor.ram.complete(executor.ram.open(0, [3, 5, 8]), lambda there: None)
    with tier.device.guard():
        tier.load(0, [1, 2])
    compute, copies = tier.device.compute, tier.device.copies

    def noting(call, name):
        def noted(*arguments, **named):
            done.append(name)
            return call(*arguments, **named)

        return noted

    copies.copy, compute.launch = noting(copies.copy, "copy"), noting(compute.launch, "kernels")
    compute.copy = noting(compute.copy, "list")
    tier._promotions.promote = noting(tier._promotions.promote, "promotion")
    tier.settle = noting(tier.settle, "books")
    executor.ram._ahead.begin = noting(executor.ram._ahead.begin, "reads")
    executor._desks[0].receive = noting(executor._desks[0].receive, "ids")
    executor.begin_step([0] * 3)
    x, ids = torch.randn(3, 64), torch.tensor([[1, 2, 3], [3, 8, 1], [2, 5, 3]])
    executor.hint(FIRST, ids, torch.ones(3, TOP_K))
    done.clear()
    executor(FIRST, x, ids, torch.ones(3, TOP_K))
    assert done == ["books", "ids", *["copy"] * 3, "list", *["kernels"] * 4, "sum", "reads"]
    executor.begin_step([0])
    executor.hint(FIRST, ids[:1], torch.ones(1, TOP_K))
    done.clear()
    executor(FIRST, x[:1], ids[:1], torch.ones(1, TOP_K))
    assert done[:6] == ["books", "ids", "list", "kernels", "sum", "promotion"]
    executor.close()


def test_a_long_pass_groups_once_and_computes_several_experts_per_launch(store):
    launched: list[list[int]] = []

    class Watched(ReferenceDeviceKernels):
        inputs = 0

        def group_input(self, layout, x):
            self.inputs += 1
            return super().group_input(layout, x)

        def group_experts(self, slab, inputs, groups, partial):
            launched.append(groups.slot.unique().tolist())
            super().group_experts(slab, inputs, groups, partial)

        def slot_experts(self, *arguments):
            raise AssertionError("long passes are grouped")

    kernels = Watched()
    executor = make(store, kernels, ALL, ALL)
    (tier,) = executor.tiers
    executor.ram.complete(executor.ram.open(0, list(range(EXPERTS))), lambda there: None)
    with tier.device.guard():
        tier.load(0, [1, 2])
    orders: list[int] = []
    tables = tier._launches._tables
    begin = tables.begin
    tables.begin = lambda flat, tile: (orders.append(len(flat)), begin(flat, tile))
    executor.begin_step([0] * 8)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 0], [0, 1, 2], [5, 4, 3], [9, 8, 7], [6, 10, 11]])
    executor(FIRST, torch.randn(8, 64), ids, torch.ones(8, TOP_K))
    assert (orders, kernels.inputs) == ([24], 1)
    assert tier.residency.width == 4
    assert [len(slots) for slots in launched] == [2, 4, 4, 1, 1]  # the hits, two waves, the rest one by one
    assert len({slot for slots in launched for slot in slots}) == EXPERTS
    executor.close()


def soak(store, kernels, steps, seed):
    """Random budgets, devices, passes and interruptions; every pass that ends is right."""
    dice = random.Random(seed)
    pool = random_steps(store, [1] * 24 + [5, 23], seed=seed)
    right = [reference(store, kernels, [step]) for step in pool]
    system = Unruly(fail=0.02, short=0.05, seed=seed)
    done = 0
    while done < steps:
        vram = dice.choice([2, 3, 6, 12, 30, ALL])
        executor = make(
            store,
            kernels,
            vram,
            dice.choice([2, 4, 9, 18, ALL]),
            seeds=[dice.choice([None, dice.randrange(1000)]) for _ in range(dice.choice([1, 1, 2, 3]))],
            system=system,
            prefetch=dice.random() < 0.7,
            prefetch_depth=(0, 2, 8)[done % 3],
            lend=vram >= 12 and dice.random() < 0.5,
            policy=dice.choice(["lru", "ema", "ema+tokens"]),
        )
        for _ in range(min(dice.choice([10, 40, 120]), steps - done)):
            number = dice.randrange(len(pool))
            stop = dice.randrange(LAYERS) if dice.random() < 0.1 else LAYERS
            executor.begin_step([number] * len(pool[number][0][0]))
            if len(pool[number][0][0]) == 1 and dice.random() < 0.6:
                found = looked_up(executor, pool[number][:stop], (lambda: dice.random() < 0.3))
                assert all(torch.equal(ours, exact) for ours, exact in zip(found, right[number], strict=False))
                if stop < LAYERS and dice.random() < 0.5:
                    executor.send(FIRST + stop, pool[number][stop][1])
                done += 1
                continue
            for layer, (x, ids, weights) in enumerate(pool[number]):
                if layer == stop:
                    if dice.random() < 0.5:
                        executor.hint(FIRST + layer, ids, weights)
                    break
                if dice.random() < 0.3:
                    executor.expect(FIRST + layer, ids[0].tolist())
                assert torch.equal(executor(FIRST + layer, x, ids, weights), right[number][layer])
            done += 1
        check(executor)
        executor.close()


@pytest.mark.parametrize("seed", range(3))
def test_soak(store, kernels, seed):
    soak(store, kernels, 60, seed)


@pytest.mark.slow
def test_long_soak(store, kernels):
    soak(store, kernels, 2000, 99)
