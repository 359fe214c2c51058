"""The engine on devices: the same tokens for every budget, refusals with numbers, faults that say what failed."""

from __future__ import annotations

import pytest
import torch

from offload.engine import devices as choice
from offload.engine.backend import ram_for_share
from offload.engine.devices import open_devices
from offload.engine.dispatch import dispatch_layers
from offload.engine.engine import Engine
from offload.engine.options import RuntimeOptions
from offload.errors import BudgetError, DeviceError, KernelError, UsageError
from offload.kernels.reference_device import ReferenceDeviceKernels
from offload.store import Store
from offload.tiers.simulated import SimulatedDevice

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]


def load(store, devices, **options):
    options = {"kernels": "reference", "context": 64} | options
    return Engine(store, RuntimeOptions(**options), devices)


def tokens(engine, count=12):
    with engine:
        return [step.token_id for step in engine.generate(PROMPT, max_tokens=count, temperature=0.0, ignore_eos=True)]


@pytest.fixture(scope="module")
def expected(store):
    return tokens(load(store, []))


def fixed_nbytes(store):
    """VRAM without any slot, and the bytes of a slot."""
    with load(store, [SimulatedDevice()]) as engine:
        (plan,) = engine._backend.vram
        return plan.fixed, plan.slot_nbytes


@pytest.mark.parametrize("slots", [2, 7, 20, 1000])
def test_tokens_do_not_depend_on_the_vram_budget(store, expected, slots):
    fixed, slot = fixed_nbytes(store)
    device = SimulatedDevice(seed=slots)
    engine = load(store, [device], vram=fixed + slots * slot, ram=ram_for_share(Store.open(store), 0.5, 64))
    (plan,) = engine._backend.vram
    assert plan.slots == min(slots, plan.experts)
    device.seal()
    assert tokens(engine) == expected
    summary = engine.summary().to_dict()
    assert 0 < summary["peak_vram_bytes"] <= plan.total
    assert summary["hits"]["vram"] > 0
    assert (summary["bytes_read"]["link"] == 0) == (slots == 1000)  # all were brought in when it was loaded
    assert any("expert slots" in line and "VRAM" in line for line in engine.describe())


@pytest.mark.parametrize("chunk", [1, 7, 20])
def test_a_bound_on_chunks_makes_room_for_slots(store, chunk):
    with load(store, [SimulatedDevice()]) as engine:
        unbounded, whole = engine._backend.vram[0].fixed, engine.logits(PROMPT)
    with load(store, [SimulatedDevice(seed=chunk)], prefill_chunk=chunk) as engine:
        (plan,) = engine._backend.vram
        assert engine.plan.chunk == chunk and plan.fixed < unbounded
        assert torch.allclose(engine.logits(PROMPT), whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("slots", [7, 20, 1000])
def test_kernels_of_prompts_have_run_before_the_first_prompt(store, expected, monkeypatch, slots):
    kernels = "offload.kernels.reference_device.ReferenceDeviceKernels"
    fixed, slot = fixed_nbytes(store)
    monkeypatch.setattr(f"{kernels}.pass_lengths", (3, 16, 40, 4096))
    ran = {"router": [], "slot_experts": [], "group_experts": [], "mla_absorbed": []}

    def spy(name, inputs):
        original = getattr(ReferenceDeviceKernels, name)

        def run(self, *args):
            ran[name].append(args[inputs].shape[0])
            return original(self, *args)

        monkeypatch.setattr(f"{kernels}.{name}", run)

    for name, inputs in (("router", 0), ("slot_experts", 1), ("group_experts", 1), ("mla_absorbed", 0)):
        spy(name, inputs)
    with load(store, [SimulatedDevice()], vram=fixed + slots * slot) as engine:
        assert {3, 16, 40, 64, 32} <= set(ran["router"])  # the context has 64 tokens; a second half follows a first
        assert {3, 16, 40, 64, 32} <= {*ran["slot_experts"], *ran["group_experts"]}
        assert 32 in ran["mla_absorbed"]
        counters = engine.counters()
        assert counters["vram"]["hits"] == counters["choices"] == engine._cache.length == 0
        assert counters["vram"]["misses"] == (engine._backend.vram[0].experts if slots == 1000 else 0)  # brought in
        for calls in ran.values():
            calls.clear()
        assert tokens(engine) == expected
        assert set(ran["router"]) <= {len(PROMPT), 1}


def test_a_context_of_one_token_has_kernels_of_prompts_too(store):
    with load(store, [SimulatedDevice()], context=1) as engine:
        assert engine.logits([5]).shape[0] == 1


@pytest.mark.parametrize("uses_blas", [True, False])
def test_workspaces_of_cublas_are_set_aside_where_it_is_used(store, monkeypatch, uses_blas):
    fixed, _ = fixed_nbytes(store)
    device = SimulatedDevice()
    device.blas_nbytes = 96 << 20
    monkeypatch.setattr("offload.kernels.reference_device.ReferenceDeviceKernels.uses_blas", uses_blas)
    with load(store, [device]) as engine:
        assert engine._backend.vram[0].fixed == fixed + (96 << 20) * uses_blas


def test_the_default_budget_counts_the_driver_once(store):
    """What a driver reports as free is what it has left of the memory already."""
    fixed, slot = fixed_nbytes(store)
    free = int((fixed + 20 * slot) / 0.94)
    allocated = []
    for driver in (0, 15 * slot):
        device = SimulatedDevice(memory=free)
        device.driver_nbytes = driver
        with load(store, [device]) as engine:
            (plan,) = engine._backend.vram
            assert plan.slots < plan.experts
            allocated.append(plan.total - plan.driver)
    assert allocated[0] == allocated[1] <= 0.94 * free


@pytest.mark.parametrize("limits", [(1, 1), (3, 1), (1, 1, 1)])
def test_tokens_do_not_depend_on_the_number_of_devices(store, expected, limits):
    fixed, slot = fixed_nbytes(store)
    devices = [
        SimulatedDevice(memory=(fixed + 9 * slot) * limit, seed=number, name=f"device {number}")
        for number, limit in enumerate(limits)
    ]
    engine = load(store, devices)
    ranges = [plan.layers for plan in engine._backend.vram]
    assert [layer for owned in ranges for layer in owned] == list(range(engine.config.num_hidden_layers))
    assert tokens(engine) == expected


@pytest.mark.parametrize("depth", [0, 1, 8])
def test_tokens_do_not_depend_on_how_far_ahead_routers_are_applied(store, expected, depth):
    fixed, slot = fixed_nbytes(store)
    ram = ram_for_share(Store.open(store), 0.5, 64)
    engine = load(store, [SimulatedDevice(seed=5)], vram=fixed + 7 * slot, ram=ram, prefetch_depth=depth)
    assert engine._backend.model.routed.early_routers == depth
    assert tokens(engine) == expected


def test_later_routers_are_applied_behind_the_shared_expert(store, monkeypatch):
    """What `expect` gets is what the router of that layer says to the state with attention and shared expert in it."""
    fixed, slot = fixed_nbytes(store)
    ram = ram_for_share(Store.open(store), 0.5, 64)
    engine = load(store, [SimulatedDevice(seed=3)], vram=fixed + 7 * slot, ram=ram)
    with engine:
        model, kernels = engine._backend.model, engine._backend.kernels
        moe_layers = [index for index, layer in enumerate(model.weights.layers) if layer.moe is not None]
        executor, route = model.routed, kernels.router
        applied, expected = {}, []

        def router(x, weight, bias, shape):
            ids, scores = route(x, weight, bias, shape)
            layer = next(at for at in moe_layers if model.weights.layers[at].moe.router is weight)
            applied.setdefault(layer, []).append((x.clone(), ids.clone()))
            return ids, scores

        monkeypatch.setattr(kernels, "router", router)
        monkeypatch.setattr(executor, "expect", lambda layer, experts: expected.append((layer, experts)))
        list(engine.generate(PROMPT, max_tokens=6, temperature=0.0, ignore_eos=True))
    early = [(layer, ids[0].tolist()) for layer, calls in applied.items() for _, ids in calls]
    assert expected and all(found in early for found in expected)
    assert {layer for layer, _ in expected} == set(moe_layers[1:])


def test_logits_on_a_device_are_those_of_the_processor(store):
    with load(store, []) as cpu, load(store, [SimulatedDevice(seed=1)]) as gpu:
        assert torch.equal(cpu.logits(PROMPT), gpu.logits(PROMPT))
        assert torch.equal(cpu.logits(PROMPT, chunk=1), gpu.logits(PROMPT, chunk=1))


def test_too_small_a_budget_is_refused_with_its_numbers(store):
    fixed, slot = fixed_nbytes(store)
    with pytest.raises(BudgetError, match=r"--vram .* KV cache of 64 tokens .* 2 expert slots .*--vram \d+MiB"):
        load(store, [SimulatedDevice()], vram=fixed + slot)


def test_a_lost_device_ends_the_generation_with_its_name(store):
    device = SimulatedDevice(name="card 0")
    with load(store, [device]) as engine:
        run = engine.generate(PROMPT, max_tokens=9, temperature=0.0)
        next(run)
        device.lost = True
        with pytest.raises(DeviceError, match=r"card 0 failed.*loaded again"):
            list(run)


# -- which devices ---------------------------------------------------------------------------


def test_tests_without_a_mark_mean_the_processor():
    assert not torch.cuda.is_available()  # also where there is a GPU
    assert open_devices(RuntimeOptions()) == []


def test_vram_needs_a_device():
    with pytest.raises(UsageError, match="--vram needs a CUDA device"):
        open_devices(RuntimeOptions(device="cpu", vram="1GiB"))


def test_cuda_that_cannot_be_had_is_an_error_and_auto_falls_back(monkeypatch, caplog):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(DeviceError, match="built without CUDA.*--device cpu"):
        open_devices(RuntimeOptions(device="cuda"))
    assert open_devices(RuntimeOptions()) == []
    assert not caplog.records


def test_other_accelerators_are_announced(monkeypatch, caplog):
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert open_devices(RuntimeOptions()) == []
    assert "ROCm" in caplog.text


@pytest.mark.parametrize(("capability", "usable"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_old_cards_are_refused_by_name(monkeypatch, capability, usable):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old Card")
    monkeypatch.setattr(choice, "select_device", lambda name: None)
    obstacle = choice._obstacle(RuntimeOptions())
    assert obstacle is None if usable else "Old Card has compute capability 7.5" in obstacle


def test_kernels_that_cannot_be_used_are_the_reason(monkeypatch):
    def refuse(name):
        raise KernelError("no compiler")

    for name, value in (("is_available", lambda: True), ("device_count", lambda: 0)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(choice, "select_device", refuse)
    with pytest.raises(DeviceError, match="no compiler"):
        open_devices(RuntimeOptions(device="cuda"))


# -- which layer goes where ------------------------------------------------------------------


def test_layers_are_shared_out_in_proportion_to_memory():
    assert dispatch_layers([100] * 10, [2000], ["a"]) == [range(10)]
    assert dispatch_layers([100] * 10, [2000, 2000], ["a", "b"]) == [range(5), range(5, 10)]
    first, second = dispatch_layers([100] * 61, [24000, 12000], ["a", "b"])
    assert (len(first), second.stop) == (pytest.approx(41, abs=1), 61)
    three = dispatch_layers([300] * 3 + [100] * 57 + [500], [24000] * 3, ["a", "b", "c"])
    assert [layer for owned in three for layer in owned] == list(range(61))


def test_layers_that_do_not_fit_are_refused_with_the_numbers():
    with pytest.raises(BudgetError, match=r"10 layers take 1000 B, the devices a, b have 400 B"):
        dispatch_layers([100] * 10, [200, 200], ["a", "b"])
    with pytest.raises(BudgetError, match="b has 60 B; its share"):
        dispatch_layers([100] * 10, [950, 60], ["a", "b"])
