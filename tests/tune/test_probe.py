"""The probe runs, measures through the real parts, and writes a file that the planner reads."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

import cli
from offload.cache.policy import LEARNING
from offload.errors import BudgetError, UsageError
from offload.kernels import FusedKernels, select
from offload.kernels.reference_device import ReferenceDeviceKernels
from offload.model.transformer import DeepseekV3
from offload.store import Store
from offload.tiers.simulated import SimulatedDevice
from offload.tune import overhead_gpu, surroundings
from offload.tune import probe as probe_module
from offload.tune.arena import Arena
from offload.tune.attention_shapes import AttentionShapes
from offload.tune.machine import ENGINE_TIMES, GPU_LAYER_S, FormatRate, Gpu, MachineSpec
from offload.tune.machine_file import load_machine, parse_machine, to_toml
from offload.tune.overhead import PROMPT_TURNS, ROUNDS, OverheadModels, _decoding, measure_prompts
from offload.tune.probe import (
    FORMATS,
    RESIDENT_FORMATS,
    Effort,
    probe,
)
from offload.tune.probe_attention import measure_attention, measure_past
from offload.tune.probe_drive import DEPTHS, measure_drive, slots_for
from offload.tune.small_model import small_config
from offload.tune.surroundings import warnings
from offload.types import PAGE, Extent, align_up

SMALL = AttentionShapes(256, 4, 64, 64, 32, 16, 32)
QUICK = Effort(
    seconds=0.01,
    passes=1,
    file_nbytes=1 << 20,
    hidden_size=256,
    moe_intermediate_size=128,
    attention=SMALL,
    buffer_nbytes=1 << 20,
)


def test_probe_of_a_folder(tmp_path: Path) -> None:
    told: list[str] = []
    twice = replace(QUICK, passes=2)
    report = probe(
        tmp_path / "m.toml", location=tmp_path, threads=1, kernels="reference", effort=twice, tell=told.append
    )
    assert [path.name for path in tmp_path.iterdir()] == ["m.toml"]  # the test file is gone
    machine = load_machine(tmp_path / "m.toml")
    assert set(machine.formats) == set(FORMATS) and set(machine.depths) == {"1", "2", "4", "8", "16", "32"}
    assert machine.drive_read == pytest.approx(report.machine.drive_read, abs=1)
    assert machine.threads == 1 and machine.ram_threads.keys() == {"1"}
    assert 0 < machine.drive_beside <= 1 and 0 < machine.kernels_beside <= 1
    assert machine.layer_s > 0 and machine.drive_latency_s > 0 and machine.ram_available <= machine.ram_total
    assert 0 < machine.plain["layer_s"] < 5 and machine.under("lru").layer_s == machine.plain["layer_s"]
    assert machine.under("ema+tokens") == machine
    assert any("torch reference" in line for line in machine.warnings)
    assert "drive (1 of 2)" in told and "RAM (2 of 2)" in told
    assert any("written to" in line for line in report.lines())
    json.dumps(report.to_dict())


def test_probe_of_a_store_reads_its_experts(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []
    real = probe_module.measure_drive

    def spy(extents, pool, seconds):  # type: ignore[no-untyped-def]
        seen.extend(extent.path for extent in extents)
        return real(extents, pool, seconds)

    monkeypatch.setattr(probe_module, "measure_drive", spy)
    sizes: dict[str, Any] = {}
    monkeypatch.setattr(probe_module, "Effort", lambda **given: (sizes.update(given), replace(QUICK, **given))[1])
    before = sorted(path.name for path in store.iterdir())
    done = CliRunner().invoke(
        cli.cli, ["probe", str(store), "-o", str(tmp_path / "m.toml"), "--kernels", "reference", "--json"]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["drive_read"] > 0
    assert {path.parent for path in seen} == {store} and len(seen) == 48
    config = Store.open(store).config
    assert sizes.pop("attention") == AttentionShapes.of(config)
    # Of a GPU only what this store is made of is measured.
    assert (sizes.pop("gpu_formats"), sizes.pop("gpu_resident_formats")) == (("int4-g32",), ("int8-g128", "bf16"))
    assert sizes.pop("routing") == {
        name: getattr(config, name)
        for name in ("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "n_shared_experts")
    }
    assert 0 < sizes.pop("layer_nbytes") < 1 << 20, "far less than a layer of a large model"
    assert sizes == {name: getattr(config, name) for name in ("hidden_size", "moe_intermediate_size")}
    assert sorted(path.name for path in store.iterdir()) == before
    planned = CliRunner().invoke(cli.cli, ["plan", str(store), "--machine", str(tmp_path / "m.toml")])
    assert planned.exit_code == 0, planned.output


def test_a_device_is_measured_through_its_interface(tmp_path: Path) -> None:
    device, effort = SimulatedDevice(1 << 30), replace(QUICK, gpu_formats=("int4-g32", "fp8"))
    report = probe(
        tmp_path / "m.toml",
        location=tmp_path,
        threads=1,
        kernels="reference",
        effort=effort,
        gpu=(device, ReferenceDeviceKernels()),
        sampling=lambda vocabulary: lambda: time.sleep(0.02) if vocabulary == 129280 else None,
    )
    machine = load_machine(tmp_path / "m.toml")
    assert machine.token_s > 0.02, "sampling counts where the processor computes"
    gpu = machine.gpu
    assert gpu is not None and gpu.name == device.name and gpu.vram == gpu.free == 1 << 30
    for name in ("read", "h2d", "h2d_pageable", "h2d_with_reads", "ram_with_copies", "attention_gflops"):
        assert getattr(gpu, name) == pytest.approx(getattr(report.machine.gpu, name), abs=1)
        assert getattr(gpu, name) > 0
    assert gpu.kernels is None and tuple(gpu.experts) == effort.gpu_formats
    assert tuple(gpu.resident) == effort.gpu_resident_formats
    for rate in (*gpu.experts.values(), *gpu.resident.values()):
        assert rate.read > 0 and rate.gflops > 0
    times = gpu.layer_s, gpu.prompt_layer_s, gpu.token_time(0), gpu.decide_s, gpu.decide_token_s
    assert all(0 < seconds < 60 for seconds in times) and gpu.layer_s != GPU_LAYER_S
    assert gpu.token_time(0) > 0.02, "sampling counts"
    assert any("of it free" in line for line in report.lines())
    assert report.to_dict()["gpu"]["h2d_pageable"] > 0
    with pytest.raises(BudgetError, match=r"has 64\.0 KiB free; measuring it takes .*--device cpu"):
        probe(
            tmp_path / "m.toml",
            location=tmp_path,
            kernels="reference",
            effort=QUICK,
            gpu=(SimulatedDevice(64 << 10), ReferenceDeviceKernels()),
        )


@pytest.mark.parametrize("nbytes", [6488064, 3649536])
def test_the_drive_is_measured_with_every_size_of_experts(tmp_path: Path, nbytes: int) -> None:
    path = tmp_path / "experts"
    with path.open("wb") as file:
        file.truncate(4 * nbytes + PAGE)
    extents = [Extent(path, number * align_up(nbytes), nbytes) for number in range(3)]
    found = measure_drive(extents, slots_for(extents), 0.001)
    assert set(found.rates) == {str(depth) for depth in DEPTHS} and min(found.rates.values()) > 0


def test_wrong_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        probe(tmp_path / "m.toml", location=tmp_path / "none", effort=QUICK)
    with pytest.raises(UsageError, match="there is no folder"):
        probe(tmp_path / "none" / "m.toml", location=tmp_path, effort=QUICK)
    with pytest.raises(BudgetError, match="needs a file of"):
        probe(tmp_path / "m.toml", location=tmp_path, kernels="reference", effort=replace(QUICK, file_nbytes=1 << 60))


def test_overheads_are_fractions_of_a_second() -> None:
    streamed: list[int] = []
    with OverheadModels(select("reference")) as models:
        once, found = (models.measure(0.01, lambda: streamed.append(1)) for _ in range(2))
    assert once.times.keys() == found.times.keys()
    assert 0 < found.layer_s < 5 and 0 <= found.token_s < 5 and 0 <= found.miss_s < 5 and 0 <= found.foresee_s < 5
    assert 0 < found.prompt.miss_s < 5 and 0 < found.prompt.layer_s < 5 and 0 <= found.prompt.token_s < 5
    assert 0 < found.prompt.learn_s < 5 and set(found.times) == set(ENGINE_TIMES)
    assert len(streamed) >= 2 * ROUNDS * 3 * 9, "between the layers of three settings, in every round"


def test_what_passes_through_the_caches_is_no_overhead_of_a_prompt() -> None:
    kernels, streamed = select("reference"), []

    def stream() -> None:
        streamed.append(1)
        time.sleep(0.05)

    config = small_config(9)
    slow, quick = (measure_prompts(kernels, done, LEARNING, config) for done in (stream, _nothing))
    assert len(streamed) >= 8 * (3 + 2 * PROMPT_TURNS)  # once at least in every MoE layer of every prompt
    assert slow.layer_s < quick.layer_s + 0.05 / 2


def test_two_depths_tell_layers_from_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """What each model takes is known here, and so what must be found."""
    layer, prompt, token, decide, decide_token = 1e-4, 2e-3, 1e-3, 4e-4, 2e-3

    @contextmanager
    def model(device: object, kernels: object, layers: int, share: float) -> Iterator[overhead_gpu._Run]:
        decoding = token + layers * layer if share == 1 else token + decide_token + layers * decide
        yield overhead_gpu._Run(lambda: decoding, lambda: 3e-3 + layers * prompt)

    monkeypatch.setattr(overhead_gpu, "_model", model)
    monkeypatch.setattr(overhead_gpu, "_products", lambda *given: 3e-5)
    found = overhead_gpu.measure_gpu_overhead(SimulatedDevice(), ReferenceDeviceKernels(), 0.0)
    assert found.layer_s == pytest.approx(layer - 3e-5) and found.prompt_layer_s == pytest.approx(prompt)
    assert (found.token_s, found.decide_s) == (pytest.approx(token), pytest.approx(decide))
    assert found.decide_token_s == pytest.approx(decide_token)


def test_small_products_are_no_overhead() -> None:
    assert 0 < overhead_gpu._products(SimulatedDevice(), ReferenceDeviceKernels(), 0.0) < 5


def test_what_passes_through_the_caches_is_no_overhead() -> None:
    with _decoding(select("reference"), LEARNING, small_config(9), 1.0, False) as step:
        step(_nothing)
        quick, slow = step(_nothing), step(lambda: time.sleep(0.05))
    assert slow.busy_s < quick.busy_s + 9 * 0.05 / 2


def _nothing() -> None:
    return


def test_settings_of_the_overheads_differ_in_what_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = select("reference")
    applied: list[int] = []
    foresee = DeepseekV3._foresee
    monkeypatch.setattr(DeepseekV3, "_foresee", lambda *given: (applied.append(1), foresee(*given)))
    reads, routers = [], []
    for share, prefetch in ((1.0, False), (0.4, False), (0.4, True)):
        applied.clear()
        with _decoding(kernels, LEARNING, small_config(9), share, prefetch) as step:
            found = [step(_nothing) for _ in range(12)]
        assert all(one.busy_s > 0 for one in found)
        reads.append(sum(one.reads for one in found))
        routers.append(len(applied))
    assert reads[0] < reads[1] <= reads[2] and routers[:2] == [0, 0] and routers[2] == 12 * 9


def test_a_machine_file_is_read_back_equal() -> None:
    machine = MachineSpec(
        name='quote " and \\ and \x7f',
        ram_total=64 << 30,
        ram_available=60 << 30,
        ram_read=5e10,
        drive_read=7e9,
        threads=8,
        gflops=123.456,
        drive_latency_s=8.5e-5,
        drive_free=10**12,
        attention_gflops=40.125,
        formats={"int4-g32": FormatRate(4e10, 400.25), "int8-g128": FormatRate(4e10, 300.5, 3e10, 350.125)},
        encode=10**8,
        gpu=Gpu(
            "card",
            24 << 30,
            1e12,
            25e9,
            kernels=4e11,
            experts={"fp8": FormatRate(5e11, 3e4), "nf4-b64": FormatRate(4e11, 3.5e4)},
            resident={"int8-g128": FormatRate(6e11, 7.25e4)},
            attention_gflops=4e4,
            layer_s=6.25e-5,
            decide_token_s=1.5e-3,
        ),
        download=10**8,
        layer_s=2.5e-4,
        miss_s=5e-5,
        prompt_miss_s=2.5e-5,
        prompt_layer_s=1.25e-3,
        prompt_token_s=1.5e-5,
        token_s=7.5e-4,
        learn_s=1e-4,
        plain={"layer_s": 1.25e-4, "token_s": 5e-4},
        drive_beside=0.875,
        kernels_beside=0.75,
        warnings=("one", "two = 2"),
        depths={"1": 2e9, "8": 7e9},
        ram_threads={"1": 2e10},
    )
    again = parse_machine(to_toml(machine), "f")
    times = {"drive_latency_s": 8.5e-5, "layer_s": 2.5e-4, "miss_s": 5e-5}
    times |= {"prompt_miss_s": 2.5e-5, "prompt_layer_s": 1.25e-3, "prompt_token_s": 1.5e-5}
    times |= {"token_s": 7.5e-4, "learn_s": 1e-4}
    plain = {"layer_s": 1.25e-4, "token_s": 5e-4}
    assert {name: getattr(again, name) for name in times} == pytest.approx(times)
    assert again.plain == pytest.approx(plain)
    assert replace(again, **times, plain=plain) == machine


def test_warnings_of_a_system(tmp_path: Path) -> None:
    def look(root: Path, **changes: object) -> str:
        values = {"kernels": "native", "drive_read": 7e9, "buffered": False, "others": 0.0} | changes
        return "\n".join(warnings(tmp_path, root=root, **values))  # type: ignore[arg-type]

    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/version").write_text("Linux 5.15 Microsoft-standard-WSL2")
    cpufreq = tmp_path / "sys/devices/system/cpu/cpu0/cpufreq"
    cpufreq.mkdir(parents=True)
    (cpufreq / "scaling_governor").write_text("powersave\n")
    for node in ("node0", "node1"):
        (tmp_path / "sys/devices/system/node" / node).mkdir(parents=True)
    text = look(tmp_path)
    for word in ("WSL2", "powersave", "2 NUMA nodes"):
        assert word in text
    (cpufreq / "energy_performance_preference").write_text("performance\n")
    quiet = look(tmp_path / "nothing")
    for word in ("WSL2", "powersave", "NUMA", "direct I/O", "slow link", "compiled kernels"):
        assert word not in quiet
    assert "powersave" not in look(tmp_path)
    assert "slow link" in look(tmp_path, drive_read=5e8)
    assert "direct I/O is refused" in look(tmp_path, buffered=True)
    assert "compiled kernels" in look(tmp_path, kernels="reference")
    assert "changed by" not in look(tmp_path, paces={"the drive's speed": [2.5e9, 2e9, 2.1e9]})
    assert "the drive's speed changed by 100%" in look(tmp_path, paces={"the drive's speed": [2e9, 3e9, 1.5e9]})
    cores = psutil.cpu_count() or 1
    assert "other work" not in look(tmp_path, others=0.09 * cores)
    assert f"other work kept {0.5 * cores:.1f} of {cores} cores" in look(tmp_path, others=0.5 * cores)


def spend(seconds: float) -> None:
    """Processor time, not wall-clock time: on a busy machine they differ."""
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def test_own_work_is_no_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what others really do (0.25 of a core here), own work and a finished child's do not count."""
    own, system = [0.0], [100.0]
    clock = [10.0]
    monkeypatch.setattr(surroundings, "_own_s", lambda: own[0])
    monkeypatch.setattr(surroundings, "_busy_s", lambda: system[0])
    monkeypatch.setattr(surroundings.time, "perf_counter", lambda: clock[0])
    others = surroundings.OtherWork()
    clock[0], own[0], system[0] = 14.0, 8.0, 109.0
    assert others.cores() == pytest.approx(0.25)
    own[0] = 9.5  # clocks of different grain: never below nothing
    assert others.cores() == 0.0


def test_own_time_and_the_systems_grow_together() -> None:
    own, system = surroundings._own_s(), surroundings._busy_s()
    spend(0.3)
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.3: pass"], check=True)
    own, system = surroundings._own_s() - own, surroundings._busy_s() - system
    assert own > 0.55
    assert system > own - 0.1  # ticks are counted in hundredths
    idle = surroundings._busy_s()
    time.sleep(0.2)
    assert surroundings._busy_s() - idle <= 0.2 * (psutil.cpu_count() or 1) + 0.1


@pytest.mark.parametrize("codec", RESIDENT_FORMATS)
@pytest.mark.parametrize("rank", [None, 96])
def test_blocks_of_attention_are_measured(codec: str, rank: int | None) -> None:
    kernels = select("auto", 1)
    if not isinstance(kernels, FusedKernels):
        pytest.skip("no compiled kernels here")
    arena = Arena(1 << 21)
    assert measure_attention(kernels, codec, replace(SMALL, q_lora_rank=rank), arena, 0.01) > 1e6
    assert measure_past(kernels, SMALL, arena, 0.01) > 1e-3
