"""Plans: they agree with the engine's budget, say no with numbers, and name what would help."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import cli
import offload
from convert.footprint import Footprint, footprints
from offload.engine.engine import Engine, ram_for_share
from offload.engine.options import RuntimeOptions
from offload.errors import BudgetError, UsageError
from offload.kernels.device import GPU_LATENT_DTYPE, latent_scratch_nbytes
from offload.kernels.reference_device import ReferenceDeviceKernels
from offload.tiers.cuda_memory import DRIVER_NBYTES, rounding_nbytes
from offload.tiers.simulated import SimulatedDevice
from offload.tune.budget import plan_ram, ram_for_slots
from offload.tune.cost import ModelCost, prefill_cost
from offload.tune.gpu_cost import GpuDemand, gpu_decode_cost, gpu_prefill_cost
from offload.tune.hits import CURVES
from offload.tune.machine import FormatRate, Gpu, MachineSpec
from offload.tune.machine_file import load_machine
from offload.tune.plan import least_ram, plan_ram_of, plan_recipe, ram_demand
from offload.tune.plan_gpu_report import gpu_lines
from offload.tune.plan_report import plan_model
from offload.tune.setting import Setting

MACHINE = MachineSpec("box", 128 << 30, 124 << 30, ram_read=72e9, drive_read=7e9, threads=16, gflops=1000.0)


def test_a_128_gb_machine(v3: dict[str, Footprint]) -> None:
    plan = plan_recipe(v3["int4"], MACHINE, Setting(), CURVES["local"])
    assert plan.runs and plan.ram and plan.decode and plan.decode_flat and plan.prefill
    assert plan.ram.total <= 0.8 * (124 << 30) + (320 << 20)
    assert plan.ram.slots == (plan.ram.total - plan.ram.fixed) // 24_772_608
    assert plan.hit == pytest.approx(CURVES["local"].at(plan.ram.slots / 14_848))
    assert 0.64 < plan.decode_flat.tok_s < plan.decode.tok_s < 7.4
    gains = dict(plan.gains)
    assert gains["a drive twice as fast"] > gains["1 GB/s more from the drive"] > plan.decode.tok_s
    assert gains["experts in int4-g128"] > plan.decode.tok_s


def test_refusals_name_what_would_run(v3: dict[str, Footprint]) -> None:
    small = replace(MACHINE, ram_total=32 << 30, ram_available=28 << 30)
    report = plan_model("V3", "checkpoint", [v3["int4"], v3["fp8"]], small)
    assert report.best is None and not report.to_dict()["runs"]
    text = "\n".join(report.lines())
    assert "does not run on box" in text and "floor of 464 expert slots" in text and "what would:" in text
    # What it asks for is exactly enough.
    least = least_ram(v3["int4"], Setting())
    process = 320 << 20
    assert plan_ram_of(v3["int4"], least, 4096, process=process).slots == 464
    with pytest.raises(BudgetError):
        plan_ram_of(v3["int4"], least - 1, 4096, process=process)
    slow = plan_recipe(v3["int4"], replace(small, ram_available=31 << 30), Setting(allow_slow=True), CURVES["local"])
    assert slow.runs and slow.ram and slow.ram.slots < 464


@pytest.mark.parametrize(("asked", "made"), [(None, 4096), (4096, 4096), (1500, 1024), (512, 512), (100, 100)])
def test_shorter_chunks_sweep_the_experts_more_often(v3: dict[str, Footprint], asked: int | None, made: int) -> None:
    setting = Setting(prompt=4096, context=4096, prefill_chunk=asked)
    quick = replace(MACHINE, gflops=1e6)  # what is swept decides, not what is computed
    plan = plan_recipe(v3["int4"], quick, setting, CURVES["local"])
    assert plan.ram and plan.prefill and plan.ram.chunk == made
    model = ModelCost.of(v3["int4"])
    assert plan.prefill == prefill_cost(model, quick, 4096, made, plan.share, CURVES["local"].alike)
    whole = plan_recipe(v3["int4"], quick, replace(setting, prefill_chunk=None), CURVES["local"])
    assert whole.ram and whole.prefill
    if made < 4096:  # memory that a chunk does not take is slots'
        assert plan.ram.slots > whole.ram.slots and plan.ttft_s > whole.ttft_s
        assert plan.prefill.read_nbytes > whole.prefill.read_nbytes
    # The smallest budget is that of the same chunks, and the engine's split.
    least = least_ram(v3["int4"], setting)
    split = plan_ram_of(v3["int4"], least, 4096, process=320 << 20, prefill_chunk=asked)
    assert split.slots == 464 and split.chunk == min(512, made)
    with pytest.raises(BudgetError):
        plan_ram_of(v3["int4"], least - 1, 4096, process=320 << 20, prefill_chunk=asked)


def test_disk_too_small(v3: dict[str, Footprint]) -> None:
    plan = plan_recipe(v3["int4"], replace(MACHINE, drive_free=300 << 30), Setting(), CURVES["local"])
    assert not plan.runs and "of disk" in plan.problems[0]
    store = replace(v3["int4"], download_nbytes=0)
    assert plan_recipe(store, replace(MACHINE, drive_free=1), Setting(), CURVES["local"]).runs


def test_settings_are_checked(v3: dict[str, Footprint]) -> None:
    for setting, message in (
        (Setting(ram=1 << 40), "--ram"),
        (Setting(vram=1 << 30), "no GPU"),
        (Setting(split="hybrid"), "--split hybrid: .* has no GPU"),
        (Setting(context=1 << 20), "--context"),
        (Setting(prefill_chunk=0), "--prefill-chunk 0"),
    ):
        with pytest.raises(UsageError, match=message):
            plan_model("V3", "checkpoint", [v3["int4"]], MACHINE, setting)


def test_conversion_time_is_the_slowest_of_its_parts(v3: dict[str, Footprint]) -> None:
    def hours(**rates: float) -> float | None:
        return plan_recipe(v3["int4"], replace(MACHINE, **rates), Setting(), CURVES["flat"]).conversion_s  # type: ignore[arg-type]

    assert hours() is None
    assert hours(download=1e8) == pytest.approx(673_150_611_808 / 1e8)
    assert hours(download=1e8, encode=5e7) == pytest.approx(673_150_611_808 / 5e7)


def test_a_gpu_is_foretold_with_the_cost_of_a_gpu(v3: dict[str, Footprint]) -> None:
    machine, model = load_machine("rtx5090-192gb"), ModelCost.of(v3["int4-small"])
    gpu = plan_recipe(v3["int4-small"], machine, Setting(prompt=2048), CURVES["local"]).gpu
    assert gpu and gpu.vram and gpu.ram and gpu.decode and gpu.prefill and gpu.problem is None
    shares = gpu.vram.slots / 14_848, gpu.ram.slots / 14_848
    demand = GpuDemand.expected(CURVES["local"], *shares)
    assert (gpu.vram_hit, gpu.hit) == (demand.vram, demand.below.hit) and gpu.hit > gpu.vram_hit > 0.3
    assert gpu.decode == gpu_decode_cost(model, machine, demand, 2048)
    prompt_slots = (gpu.vram.slots - gpu.vram.lent) / 14_848
    assert gpu.prefill == gpu_prefill_cost(model, machine, 2048, 2048, prompt_slots, shares[1], CURVES["local"].alike)
    assert gpu.ttft_s == gpu.prefill.total_s
    gains = dict(gpu.gains)
    assert gains["a link twice as fast"] > gains["a GPU twice as fast"] > gpu.decode.tok_s
    hybrid = gpu_decode_cost(model, machine, demand, 2048, hybrid=True)
    assert gains["--split hybrid"] == hybrid.tok_s > gpu.decode.tok_s
    assert {"8 GiB more VRAM", "32 GiB more RAM", "a drive twice as fast"} <= set(gains)
    assert min(gains.values()) > gpu.decode.tok_s
    other = plan_recipe(v3["int4-small"], machine, Setting(prompt=2048, split="hybrid"), CURVES["local"]).gpu
    assert other and other.decode == hybrid and other.vram == gpu.vram and other.to_dict()["split"] == "hybrid"
    assert "--split hybrid" not in dict(other.gains) and dict(other.gains)["a link twice as fast"] > hybrid.tok_s
    assert next(gpu_lines(other, model, machine.gpu)).startswith("with --device cuda --split hybrid, a forecast")  # type: ignore[arg-type]
    assert "nothing measured here" in gpu.rests_on
    values = gpu.to_dict()
    assert json.loads(json.dumps(values))["bound_by"] == gpu.decode.binding == "link"
    assert values["vram"]["total"] <= 32 << 30 and values["gains"] == gains


def test_the_split_of_vram_is_that_of_the_engine(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device with CUDA's memory: what plan gives to slots is what the engine has."""
    device = SimulatedDevice(64 << 30)
    monkeypatch.setattr(device, "driver_nbytes", DRIVER_NBYTES)
    monkeypatch.setattr(device, "rounding_nbytes", rounding_nbytes)
    monkeypatch.setattr(ReferenceDeviceKernels, "latent_dtype", GPU_LATENT_DTYPE)
    monkeypatch.setattr(ReferenceDeviceKernels, "scratch_nbytes", lambda self, *sizes: latent_scratch_nbytes(*sizes))
    footprint, slot = footprints(store).items[0], ModelCost.of(footprints(store).items[0]).layout.slot_nbytes
    machine = replace(MACHINE, gpu=Gpu("simulated device", 64 << 30, 1e12, 25e9))
    whole = plan_recipe(footprint, machine, Setting(context=300), CURVES["local"]).gpu
    assert whole and whole.vram and whole.ram and whole.vram.slots == whole.vram.experts
    vram = whole.vram.total - 29 * slot
    ram = 2 << 30
    forecast = plan_recipe(footprint, machine, Setting(context=300, vram=vram, ram=ram), CURVES["local"]).gpu
    options = RuntimeOptions(context=300, vram=vram, ram=ram, kernels="reference", allow_slow=True)
    with Engine(store, options, [device]) as engine:
        theirs = engine.vram_plans
    assert forecast and forecast.problem is None
    assert [forecast.vram] == theirs and theirs[0].slots < theirs[0].experts


def test_a_gpu_may_run_what_ram_alone_cannot(v3: dict[str, Footprint]) -> None:
    gpu = Gpu("card", 24 << 30, 1e12, 25e9)
    small = replace(MACHINE, ram_total=24 << 30, ram_available=20 << 30, gpu=gpu)
    report = plan_model("V3", "checkpoint", [v3["int4-small"]], small)
    assert report.best is None and report.best_on_gpu is report.plans[0] and report.to_dict()["runs"]
    text = "\n".join(report.lines())
    assert "does not run without its GPU on box" in text and "with --device cuda, a forecast" in text
    assert "with --device cuda" in report.page().html()
    cramped = plan_recipe(v3["int4"], load_machine("rtx3060-64gb"), Setting(), CURVES["local"]).gpu
    assert cramped and cramped.decode is None and cramped.problem and "--vram" in cramped.problem
    report = plan_model("V3", "checkpoint", [v3["int4"]], load_machine("rtx3060-64gb"))
    assert any("it does not run: --vram" in line for line in report.lines())


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({}, "nothing measured here"),
        ({"kernels": 1e12}, "in part"),
        ({"experts": {"int4-g32": FormatRate(1e12, 1e4)}}, "in part"),
        (
            {
                "experts": {"int4-g32": FormatRate(1e12, 1e4)},
                "resident": {"int8-g128": FormatRate(1e12, 1e4)},
            },
            "kernels measured here",
        ),
    ],
)
def test_a_forecast_says_what_it_rests_on(v3: dict[str, Footprint], figures: dict[str, Any], words: str) -> None:
    gpu = replace(Gpu("card", 24 << 30, 1e12, 25e9), **figures)
    report = plan_model("V3", "checkpoint", [v3["int4"]], replace(MACHINE, gpu=gpu))
    assert any("a forecast from" in line and words in line for line in report.lines())


def test_a_store_is_planned_as_the_engine_loads_it(store: Path) -> None:
    """Same budget, same split: only the measured size of the process may differ."""
    footprint = footprints(store).items[0]
    ram = ram_for_share(store, 0.5, context=64) + (1 << 20)  # the test process may have grown to any size
    with offload.load(store, ram=ram, context=64, kernels="reference") as engine:
        theirs = engine.plan
    assert plan_ram_of(footprint, ram, 64, process=theirs.process) == theirs


def test_checkpoint_and_its_store_agree(checkpoint: Path, store: Path) -> None:
    """Sizes foretold from headers are those of the finished store."""
    foretold = {item.recipe: item for item in footprints(checkpoint).items}["int4"]
    actual = footprints(store).items[0]
    assert (foretold.experts, foretold.resident) == (actual.experts, actual.resident)
    assert foretold.resident_nbytes == actual.resident_nbytes
    assert abs(foretold.store_nbytes - actual.store_nbytes) < 400_000  # text files and tokenizer


@pytest.fixture
def machine_file(tmp_path: Path) -> Path:
    file = tmp_path / "machine.toml"
    file.write_text('name="t"\nram={total="16GiB", read="10GB"}\ndrive={read="1GB"}\ncpu={threads=2, gflops=50}\n')
    return file


def test_command_line(store: Path, machine_file: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(cli.cli, ["plan", str(store), "--machine", str(machine_file), "--json"])
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout.splitlines()[-1])
    assert values["kind"] == "store" and values["runs"]
    assert values["recipes"][0]["ram"]["slots"] == values["recipes"][0]["experts_total"]
    chunked = ["plan", str(store), "--machine", str(machine_file), "--prefill-chunk", "7", "--json"]
    assert json.loads(runner.invoke(cli.cli, chunked).stdout.splitlines()[-1])["recipes"][0]["ram"]["chunk"] == 7
    text = runner.invoke(cli.cli, ["plan", str(store), "--machine", str(machine_file), "--hits", "flat"]).stdout
    assert "tok/s" in text and "flat (preset)" in text


def test_this_machine_must_be_measured_first(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.cli, ["plan", str(store)])
    assert isinstance(done.exception, UsageError) and "expertpager probe" in str(done.exception)


def test_rates_of_formats_are_used(v3: dict[str, Footprint]) -> None:
    slow = replace(MACHINE, formats={"int4-g32": FormatRate(1e9, 1.0)})
    fast = plan_recipe(v3["int4"], MACHINE, Setting(), CURVES["local"])
    assert plan_recipe(v3["int4"], slow, Setting(), CURVES["local"]).decode.tok_s < fast.decode.tok_s / 5  # type: ignore[union-attr]


def test_page_of_a_plan(v3: dict[str, Footprint], tmp_path: Path) -> None:
    """Facts of the best recipe, charts, every recipe; and the reasons where nothing runs."""
    report = plan_model("V3", "checkpoint", list(v3.values()), load_machine("rtx5090-192gb"))
    html = report.page().html()
    assert report.best and report.best.decode
    assert f"{report.best.decode.tok_s:.2f} tok/s" in html and html.count("<svg") == 4
    assert all(f"<th>{name}</th>" in html for name in v3)
    small = replace(MACHINE, ram_total=32 << 30, ram_available=28 << 30)
    refused = plan_model("V3", "checkpoint", [v3["fp8"]], small).page().html()
    assert "does not run" in refused and "floor of 464 expert slots" in refused and "<svg" not in refused


def test_memory_for_so_many_slots_is_exactly_enough(v3: dict[str, Footprint]) -> None:
    settings = itertools.product((256, 4096, 32768), (464, 700, 2000, 9000), (None, 100, 1100))
    for context, wanted, prefill_chunk in settings:
        demand = ram_demand(v3["int4"], context, 320 << 20) | {"prefill_chunk": prefill_chunk}
        config = v3["int4"].config
        enough = ram_for_slots(config, wanted, **demand)
        assert plan_ram(config, limit=enough, **demand).slots >= wanted
        with_less = plan_ram(config, limit=enough - 1, allow_slow=True, **demand)
        assert with_less.slots < wanted or with_less.chunk < plan_ram(config, limit=enough, **demand).chunk


def test_chunks_grow_with_memory_and_end_at_the_context(v3: dict[str, Footprint]) -> None:
    demand = ram_demand(v3["int4"], 4096, 320 << 20)
    config = v3["int4"].config
    sizes = (31, 32, 48, 64, 128)
    plans = [plan_ram(config, limit=gib << 30, **demand) for gib in sizes]
    chunks = [plan.chunk for plan in plans]
    assert chunks == sorted(chunks) and chunks[0] % 512 == 0 and chunks[-1] == 4096
    for plan, gib in zip(plans, sizes, strict=True):
        assert plan.slots >= 464 and (gib << 30) - plan.slot_nbytes < plan.total <= gib << 30
    for asked, chunk in ((1, 1), (511, 511), (1023, 512), (1024, 1024), (4095, 3584), (10**6, 4096)):
        plan = plan_ram(config, limit=128 << 30, prefill_chunk=asked, **demand)
        assert plan.chunk == chunk and (128 << 30) - plan.slot_nbytes < plan.total <= 128 << 30
        assert (plan.working < plans[-1].working) == (plan.slots > plans[-1].slots) == (chunk < 4096)
