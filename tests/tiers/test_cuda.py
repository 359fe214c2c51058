"""The device tier on a real GPU: the same tokens for every budget, graphs like calls, copies from locked pages."""

from __future__ import annotations

import pytest
import torch
from paging_samples import EXPERTS, FIRST, LAYERS, make_store, random_steps

from offload.engine.engine import Engine
from offload.engine.options import RuntimeOptions
from offload.errors import BudgetError
from offload.kernels import select_device
from offload.tiers.device_executor import DeviceExecutor, DeviceShare
from offload.tiers.host import SlotPool

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = [1, 1, 7, 1, 23, 1, 1]
PROMPT = list(range(3, 40))


@pytest.fixture
def device():
    from offload.tiers.cuda import CudaDevice

    found = CudaDevice(0)
    yield found
    found.close()


def outputs(store, device, vram, ram, **options):
    share = DeviceShare(device, select_device(), range(FIRST, FIRST + LAYERS), vram)
    executor = DeviceExecutor(store, [share], slots=ram, max_tokens=23, allow_slow=True, policy="ema", **options)
    found = []
    for number, step in enumerate(random_steps(store, LENGTHS)):
        executor.begin_step([number] * len(step[0][0]))
        for layer, tensors in enumerate(step):
            x, ids, weights = (tensor.to(device.torch_device) for tensor in tensors)
            executor.hint(FIRST + layer, ids, weights)
            found.append(executor(FIRST + layer, x, ids, weights).cpu())
    telemetry = executor.counters()
    executor.close()
    return found, telemetry


def test_outputs_do_not_depend_on_budgets(device, tmp_path):
    store = make_store(tmp_path, "int4-g32", hidden=256)
    everything, _ = outputs(store, device, LAYERS * EXPERTS, LAYERS * EXPERTS)
    for vram, ram in ((2, 2), (5, 9), (20, 12)):
        found, telemetry = outputs(store, device, vram, ram)
        for ours, right in zip(found, everything, strict=True):
            assert torch.equal(ours, right)
        assert telemetry.vram.bytes_read > 0
        assert telemetry.vram.read_s > 0


def test_what_the_processor_computes_agrees_within_rounding(device, tmp_path):
    from offload.kernels import select

    store = make_store(tmp_path, "int4-g32", hidden=256)
    everything, _ = outputs(store, device, LAYERS * EXPERTS, LAYERS * EXPERTS)
    found, _ = outputs(store, device, 5, 30, below=select())
    for ours, right in zip(found, everything, strict=True):
        torch.testing.assert_close(ours, right, rtol=0.05, atol=0.05 * float(right.abs().max()))


def test_tokens_do_not_depend_on_the_vram_budget(store):
    tokens = set()
    for slots in (2, 20, 10**6):
        with Engine(store, RuntimeOptions(device="cuda", context=64)) as probe:
            (plan,) = probe._backend.vram
        vram = plan.fixed + min(slots, plan.experts) * plan.slot_nbytes
        with Engine(store, RuntimeOptions(device="cuda", context=64, vram=vram)) as engine:
            run = engine.generate(PROMPT, max_tokens=16, temperature=0.0, ignore_eos=True)
            tokens.add(tuple(step.token_id for step in run))
            assert engine.summary().peak_vram_bytes <= engine._backend.vram[0].total
    assert len(tokens) == 1


def test_a_recorded_step_gives_the_bits_of_the_calls(store):
    with Engine(store, RuntimeOptions(device="cuda", context=64)) as engine:
        recorded = engine.logits(PROMPT, chunk=1)
        engine._model.single = None
        assert torch.equal(recorded, engine.logits(PROMPT, chunk=1))


@pytest.mark.parametrize("context", [64, 4096])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_small_models_find_all_their_memory_one_after_the_other(store, kernels, context):
    """Small tensors take whole blocks of the allocator, and cuBLAS keeps its workspaces from one engine to the next."""
    for _ in range(3):
        with Engine(store, RuntimeOptions(device="cuda", kernels=kernels, context=context)) as engine:
            assert engine.logits(PROMPT).isfinite().all()
            assert len(list(engine.generate(PROMPT, max_tokens=4, ignore_eos=True))) == 4


def test_recorded_work_is_repeated_over_the_same_tensors(device):
    x, out = torch.zeros(8, device="cuda"), torch.zeros(8, device="cuda")
    with device.guard():
        work = device.record(lambda: out.copy_(x * 2 + 1))
        for value in (1.0, 5.0):
            x.fill_(value)
            work()
            assert out.eq(2 * value + 1).all()


def test_pages_are_locked_once_and_copies_run_beside_the_host(device):
    pool = SlotPool(4, 8 << 20)
    assert device.page_lock(pool.bytes, pool.stride) is None
    assert device.page_lock(pool.bytes, pool.stride) is None
    with device.guard():
        there = device.empty((pool.stride,), torch.uint8)
        for slot in range(4):
            pool.tensor(slot).fill_(slot + 1)
            begun = device.copies.record(timed=True)
            device.copies.copy(there, pool.tensor(slot))
            end = device.copies.record(timed=True)
            device.compute.wait(end)
            assert int(there.max()) == int(there.min()) == slot + 1
            assert end.done()
            assert end.seconds_since(begun) > 0
    device.close()


def test_what_does_not_fit_is_refused_with_the_numbers(device):
    with device.guard(), pytest.raises(BudgetError, match="cannot be allocated.*--vram"):
        device.empty((1 << 50,), torch.uint8)
