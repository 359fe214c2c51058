"""The cost of a GPU beside recorded steps and prompts, and what must hold for any machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from convert.footprint import Footprint
from convert.synthetic import V3_CONFIG
from offload.config import ModelConfig
from offload.tune.cost import ModelCost
from offload.tune.gpu_cost import GpuDemand, gpu_decode_cost, gpu_prefill_cost
from offload.tune.hits import CURVES
from offload.tune.layer_clock import Demand
from offload.tune.machine import GPU_TOKEN_S, FormatRate, Gpu, MachineSpec

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
GPU = Gpu("card", 24 << 30, 1e12, 25e9)
MACHINE = MachineSpec("box", 128 << 30, 124 << 30, ram_read=72e9, drive_read=7e9, threads=16, gflops=1000.0, gpu=GPU)
RESIDENT_READ = {"NVIDIA H200": 1.93e12, "NVIDIA H100": 1.51e12}
"""Attention's matrices in int8-g128: the sum of their times in gpu_speed.jsonl over their bytes."""


def recorded() -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (RESULTS / "gpu.jsonl").read_text().splitlines()]
    # The first row is of kernels that have been replaced since.
    return [row["numbers"] for row in rows if "decode" in row["numbers"] and row["commit"] != "bc7e3c8"]


def of_row(row: dict[str, Any], measured: bool) -> tuple[ModelCost, MachineSpec]:
    """The model and the machine of a row: its own figures of memory and link, of kernels if `measured`. Neither
    sampling nor a policy that learns was part of the steps."""
    config = ModelConfig.from_hf(V3_CONFIG | {"num_hidden_layers": row["plan"]["layers"], "first_k_dense_replace": 1})
    embedding = 2 * config.vocab_size * config.hidden_size
    model = ModelCost(config, "int4-g32", "int8-g128", row["plan"]["resident"] + embedding)
    gpu = Gpu(row["device"], 80 << 30, row["read"], row["link"], token_s=0.0, decide_token_s=0.0)
    if measured:
        gpu = replace(
            gpu,
            experts={"int4-g32": FormatRate(row["experts"]["bytes_per_s"], 105e3)},
            resident={"int8-g128": FormatRate(RESIDENT_READ[row["device"][:11]], 317e3)},
        )
    return model, replace(MACHINE, gpu=gpu)


@pytest.mark.parametrize("measured", [True, False], ids=["own figures", "defaults"])
@pytest.mark.parametrize("row", recorded(), ids=lambda row: f"{row['device'][7:11]}-{row['plan']['slots']}")
def test_recorded_steps(row: dict[str, Any], measured: bool) -> None:
    model, machine = of_row(row, measured)
    for step in row["decode"]:
        cost = gpu_decode_cost(model, machine, GpuDemand(step["planted_hits"], Demand(1.0)), context=64)
        assert cost.total_s == pytest.approx(step["step_s"], rel=0.1)
        assert cost.link_s == pytest.approx((1 - step["planted_hits"]) * model.token_nbytes / row["link"])
        assert cost.copied_nbytes == pytest.approx((1 - step["planted_hits"]) * model.token_nbytes)
        assert cost.stall_s == cost.processor_s == cost.read_nbytes == 0
        assert cost.binding == ("link" if step["planted_hits"] < 0.75 else "device") or step["planted_hits"] == 0.75


@pytest.mark.parametrize(("one", "other"), [("H200", "H100"), ("H100", "H200")])
def test_steps_of_a_gpu_from_what_layers_take_on_another(one: str, other: str) -> None:
    """Only the time per layer is taken from the one, from its steps in which nothing is copied."""

    def seconds(row: dict[str, Any], hits: float, layer_s: float) -> float:
        model, machine = of_row(row, measured=True)
        assert machine.gpu
        machine = replace(machine, gpu=replace(machine.gpu, layer_s=layer_s))
        return gpu_decode_cost(model, machine, GpuDemand(hits, Demand(1.0)), context=64).total_s

    rows = {name: [row for row in recorded() if name in row["device"]] for name in (one, other)}
    left = [(row["decode"][-1]["step_s"] - seconds(row, 1.0, 0.0)) / row["plan"]["layers"] for row in rows[one]]
    for row in rows[other]:
        for step in row["decode"]:
            assert seconds(row, step["planted_hits"], fmean(left)) == pytest.approx(step["step_s"], rel=0.05)


@pytest.mark.parametrize("measured", [True, False], ids=["own figures", "defaults"])
@pytest.mark.parametrize("row", recorded(), ids=lambda row: f"{row['device'][7:11]}-{row['plan']['slots']}")
def test_recorded_prompts(row: dict[str, Any], measured: bool) -> None:
    model, machine = of_row(row, measured)
    copied = row["prefill"]["copied_experts"]
    cost = gpu_prefill_cost(model, machine, 2048, 2048, 1 - copied / row["plan"]["experts"], 1.0)
    assert cost.total_s == pytest.approx(row["prefill"]["seconds"], rel=0.1)
    assert cost.copied_nbytes == pytest.approx(copied * model.expert_nbytes, rel=1e-6)
    assert cost.tokens == 2048 and cost.tok_s == pytest.approx(2048 / cost.total_s)


def test_the_run_of_an_engine() -> None:
    """Greedy decoding on the H100 with every expert in VRAM and with slots for 95% of them, all of which hit: one dense
    and three MoE layers of 64 experts, a vocabulary of 32768. No figure of kernels."""
    rows = [json.loads(line)["numbers"] for line in (RESULTS / "gpu_bench.jsonl").read_text().splitlines()]
    took = next(row["ms per token"] for row in rows if "ms per token" in row)
    config = ModelConfig.from_hf(
        V3_CONFIG
        | {"num_hidden_layers": 4, "first_k_dense_replace": 1, "n_routed_experts": 64, "vocab_size": 32768}
    )
    model = ModelCost(config, "int4-g32", "int8-g128", 1_300_000_000 + 2 * 2 * 32768 * 7168)
    machine = replace(MACHINE, gpu=Gpu("NVIDIA H100", 80 << 30, 2.818e12, 53.39e9, token_s=GPU_TOKEN_S))
    for paged, setting in ((False, "--vram 16GB, temperature 0"), (True, "--vram 8GB, temperature 0")):
        cost = gpu_decode_cost(model, machine, GpuDemand(1.0, Demand(1.0), paged), 50)
        assert cost.total_s == pytest.approx(took[setting] / 1e3, rel=0.1)


@pytest.fixture
def model(v3: dict[str, Footprint]) -> ModelCost:
    return ModelCost.of(v3["int4"])


@pytest.mark.parametrize("hybrid", [False, True])
def test_more_of_anything_is_never_slower(model: ModelCost, hybrid: bool) -> None:
    def seconds(vram: float = 0.05, ram: float = 0.3, machine: MachineSpec = MACHINE) -> float:
        demand = GpuDemand.expected(CURVES["local"], vram, ram)
        return gpu_decode_cost(model, machine, demand, 2048, hybrid=hybrid).total_s

    def by(values: tuple[float, ...], change: Any) -> list[float]:
        return [seconds(machine=replace(MACHINE, **change(value))) for value in values]

    rising = [seconds(vram=share) for share in (0.0, 0.03, 0.1, 0.3, 0.7, 0.99, 1.0)]
    assert rising == sorted(rising, reverse=True) and rising[0] > 1.5 * rising[-1]
    assert seconds(ram=0.1) > seconds(ram=0.3) > seconds(ram=0.6)
    links = by((12e9, 25e9, 50e9), lambda h2d: {"gpu": replace(GPU, h2d=h2d)})
    assert links[0] > links[1] > links[2]
    drives = by((3e9, 7e9, 14e9), lambda rate: {"drive_read": rate})
    assert drives[0] > drives[1] > drives[2]
    memories = by((0.5e12, 1e12, 2e12), lambda read: {"gpu": replace(GPU, read=read)})
    assert memories[0] > memories[1] > memories[2]


def test_a_prompt_pays_for_copies_and_reads(model: ModelCost) -> None:
    def prompt(vram: float, both: float, machine: MachineSpec = MACHINE) -> Any:
        return gpu_prefill_cost(model, machine, 4096, 2048, vram, both)

    slow, quick = prompt(0.1, 0.3), prompt(0.1, 0.3, replace(MACHINE, gpu=replace(GPU, h2d=50e9)))
    assert slow.link_s == pytest.approx(2 * quick.link_s) and slow.total_s >= quick.total_s
    assert slow.copied_nbytes == pytest.approx(2 * 58 * 256 * 0.9 * model.expert_nbytes, rel=1e-3)
    assert slow.read_nbytes == pytest.approx(2 * 58 * 256 * 0.7 * model.expert_nbytes, rel=1e-3)
    assert prompt(0.1, 1.0).stall_s == prompt(0.1, 1.0).read_nbytes == 0
    assert prompt(0.3, 0.1) == prompt(0.3, 0.3), "what is in VRAM is not read"
    assert prompt(0.1, 0.3).binding == "drive" and prompt(0.1, 1.0).binding == "link"


def test_the_processor_takes_a_part_where_that_is_faster(model: ModelCost) -> None:
    demand = GpuDemand(0.3, Demand(1.0))
    copying, sharing = (gpu_decode_cost(model, MACHINE, demand, hybrid=hybrid) for hybrid in (False, True))
    assert sharing.total_s < copying.total_s and sharing.copied_nbytes < copying.copied_nbytes
    slow = replace(MACHINE, formats={"int4-g32": FormatRate(1e8, 1.0)})
    assert gpu_decode_cost(model, slow, demand, hybrid=True) == gpu_decode_cost(model, slow, demand)
    # What the processor does beside the copies costs nothing: only what is left of it does.
    even = gpu_decode_cost(model, replace(MACHINE, ram_read=1e12, formats={"int4-g32": FormatRate(25e9, 1.0)}), demand)
    assert even == copying


def test_reads_that_have_begun_are_waited_for_less(model: ModelCost) -> None:
    late, early = (
        gpu_decode_cost(model, MACHINE, GpuDemand(0.5, Demand(0.9, ahead=ahead))) for ahead in (0.0, 0.1)
    )
    assert 0 < early.stall_s < late.stall_s and early.read_nbytes == late.read_nbytes
    assert early.link_s == late.link_s


def test_tiers_are_inclusive() -> None:
    curve = CURVES["local"]
    demand = GpuDemand.expected(curve, 0.1, 0.3)
    assert demand.below == curve.demand(0.3) and demand.vram == pytest.approx(curve.at(0.1), abs=0.01)
    assert GpuDemand.expected(curve, 0.3, 0.1).below == curve.demand(0.3)
    whole = GpuDemand.expected(curve, 1.0, 0.3)
    assert whole.vram == 1 and whole.below.reads == 0 and not whole.paged and demand.paged


def test_what_nobody_measured_comes_from_the_memory() -> None:
    for codec in ("int4-g32", "int8-g128", "fp8", "bf16", "nf4-b64", "int3-g32", "int2-g32"):
        for kind in ("expert_rate", "resident_rate"):
            small, large = (getattr(replace(GPU, read=read), kind)(codec) for read in (3e11, 1e12))
            assert 0 < small.read < 3e11 and small.read < large.read < 1e12 and small.gflops < large.gflops
    old = replace(GPU, kernels=4e11)
    assert old.expert_rate("int4-g32").read == 4e11 and old.expert_rate("fp8") == GPU.expert_rate("fp8")
    new = replace(old, experts={"int4-g32": FormatRate(5e11, 7e4)}, resident={"fp8": FormatRate(3e11, 8e4)})
    assert new.expert_rate("int4-g32") == FormatRate(5e11, 7e4) and new.resident_rate("fp8") == FormatRate(3e11, 8e4)
    assert new.resident_rate("int4-g32") == GPU.resident_rate("int4-g32")
