"""The benchmark counts what happened, never repeats a prompt, and stands beside its prediction."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import cli
from convert import convert
from convert.synthetic import write_checkpoint
from offload.cache.policy import CacheShape
from offload.engine import backend
from offload.engine import bench as module
from offload.engine.bench import bench, forget_pages, spread
from offload.engine.beside_plan import model_cost
from offload.engine.engine import Engine, ram_for_share
from offload.engine.options import RuntimeOptions
from offload.errors import UsageError
from offload.store import Store
from offload.tiers.simulated import SimulatedDevice
from offload.tune.gpu_cost import GpuDemand, gpu_decode_cost
from offload.tune.hits import curve_of_trace
from offload.tune.machine_file import load_machine
from offload.tune.synthetic import synthetic_trace

SMALL = {"context": 64, "kernels": "reference"}
MACHINE = 'name="t"\nram={total="16GiB", read="10GB"}\ndrive={read="1GB"}\ncpu={threads=2, gflops=50}\n'


def test_counts_and_prompts(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[list[int]] = []
    real = module.run_once

    def spy(engine, prompt, max_tokens, seed):  # type: ignore[no-untyped-def]
        prompts.append(list(prompt))
        return real(engine, prompt, max_tokens, seed)

    monkeypatch.setattr(module, "run_once", spy)
    ram = ram_for_share(store, 0.5, context=64)
    report = bench(store, cold=2, warm=2, prompt_tokens=9, max_tokens=5, ram=ram + (64 << 20), **SMALL)
    assert len(report.cold) == len(report.warm) == 2
    assert len({tuple(prompt) for prompt in prompts}) == 4 and {len(prompt) for prompt in prompts} == {9}
    for sample in (*report.cold, *report.warm):
        assert (sample.prefill.tokens, sample.decode.tokens) == (9, 4)
        # Three MoE layers, top-4: every decoded token makes twelve demands.
        assert sample.decode.hits + sample.decode.misses == 4 * 12
    for sample in report.cold:
        assert sample.prefill.hits == 0 and sample.prefill.misses > 0
        assert sample.prefill.bytes_read == sample.prefill.misses * _stride(store)
    assert report.machine is None and any("no prediction" in line for line in report.lines())


def _stride(store: Path) -> int:
    return Store.open(store).layout.stride


def test_prediction_and_command_line(store: Path, tmp_path: Path) -> None:
    machine = tmp_path / "m.toml"
    machine.write_text(MACHINE)
    arguments = ["bench", str(store), "--machine", str(machine), "--warm", "1", "-n", "3", "--prompt-tokens", "5"]
    arguments += ["--context", "64", "--kernels", "reference"]
    done = CliRunner().invoke(cli.cli, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout.splitlines()[-1])
    assert values["share"] == 1.0 and values["medians"]["warm_decode_tok_s"] > 0
    decode = values["compared"]["warm decode, per token"]
    causes = decode["hits_s"] + decode["drive_s"] + decode["processor_s"]
    assert causes == pytest.approx(decode["measured_s"] - decode["predicted_s"])
    text = CliRunner().invoke(cli.cli, arguments).stdout
    for part in ("cold prefill", "warm decode", "predicted", "first token after", "peak RAM"):
        assert part in text


def test_the_forecast_has_the_half_life_of_the_run(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "process_nbytes", lambda: 1 << 30)  # half of the experts, whatever this one takes
    machine, trace = tmp_path / "m.toml", tmp_path / "t.npz"
    machine.write_text(MACHINE)
    config = Store.open(store).config
    shape = CacheShape(len(config.moe_layers), config.n_routed_experts, config.num_experts_per_tok)
    synthetic_trace("local", shape, tokens=200).save(trace)
    ram = ram_for_share(store, 0.5, context=64)
    options = {"policy": "ema", "half_life": 1.0, "prefetch": False, "ram": ram, **SMALL}
    report = bench(store, machine=machine, hits=str(trace), prompt_tokens=4, max_tokens=2, warm=1, **options)
    short, own = (curve_of_trace(trace, config, "ema", None, life).at(report.share) for life in (1.0, None))
    assert report.expected_hit_rate == short != own


def test_without_a_tokenizer(tmp_path: Path) -> None:
    store = tmp_path / "store"
    convert(write_checkpoint(tmp_path / "source", num_hidden_layers=2), store)
    report = bench(store, warm=1, prompt_tokens=4, max_tokens=2, **SMALL)
    assert report.warm[0].decode.tokens == 1
    (tmp_path / "p.txt").write_text("hello\n")
    with pytest.raises(UsageError, match="no tokenizer"):
        bench(store, prompts=tmp_path / "p.txt", **SMALL)


def test_wrong_use(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 2 tokens"):
        bench(store, max_tokens=1, **SMALL)
    (tmp_path / "p.txt").write_text("\n")
    with pytest.raises(UsageError, match="one per line"):
        bench(store, prompts=tmp_path / "p.txt", **SMALL)
    with pytest.raises(UsageError, match="cannot be read"):
        bench(store, prompts=tmp_path / "none.txt", **SMALL)


def test_spread_and_pages(tmp_path: Path) -> None:
    assert spread([1.0, 3.0, 2.0], "s") == "2.00 (1.00-3.00) s" and spread([1.5], "") == "1.50"
    (tmp_path / "a.safetensors").write_bytes(b"x")
    assert forget_pages(tmp_path, everything=False) == []


def test_page_and_waiting_per_layer(store: Path, tmp_path: Path) -> None:
    ram = ram_for_share(store, 0.5, context=64) + (64 << 20)
    report = bench(store, prompt_tokens=5, max_tokens=4, warm=2, ram=ram, **SMALL)
    waited = sum(sum(sample.layer_stall_s) for sample in report.warm)
    assert len(report.layer_stall_s) == 3
    assert sum(report.layer_stall_s) == pytest.approx(waited / sum(sample.decode.tokens for sample in report.warm))
    assert waited == pytest.approx(sum(sample.decode.stall_s for sample in report.warm), abs=1e-4)
    html = report.page().write(tmp_path / "bench.html").read_text()
    assert "cold 1, prefill" in html and "warm 2, decode" in html and "<svg" in html


GPU = '[gpu]\nname="card"\nvram="24GiB"\nread="1000GB"\nh2d="25GB"\n'


def _on_a_device(store: Path, monkeypatch: pytest.MonkeyPatch, slots: int) -> dict[str, object]:
    """Options with which engines find a simulated device and have `slots` expert slots on it."""
    monkeypatch.setattr("offload.engine.engine.open_devices", lambda options: [SimulatedDevice()])
    with Engine(store, RuntimeOptions(**SMALL)) as engine:
        (plan,) = engine.vram_plans
    return {**SMALL, "vram": plan.fixed + slots * plan.slot_nbytes, "ram": ram_for_share(store, 0.5, 64) + (64 << 20)}


@pytest.mark.parametrize(("slots", "split"), [(12, "gpu"), (12, "hybrid"), (48, "gpu")])
def test_a_gpu_is_compared_with_the_model_of_a_gpu(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slots: int, split: str
) -> None:
    machine = tmp_path / "m.toml"
    machine.write_text(MACHINE + GPU)
    options = _on_a_device(store, monkeypatch, slots)
    report = bench(store, machine=machine, prompt_tokens=9, max_tokens=6, warm=2, split=split, **options)
    values = json.loads(json.dumps(report.to_dict()))
    assert report.gpu is not None and (report.gpu.slots, report.gpu.share) == (slots, slots / 48)
    assert values["vram"]["slots"] == slots and values["vram"]["split"] == split
    for sample in (*report.cold, *report.warm):
        vram = sample.decode.vram
        assert vram is not None
        # Three MoE layers, top-4, five tokens: what VRAM lacks is copied or computed in RAM.
        assert vram.hits + vram.misses + sample.decode.computed_in_ram == 5 * 12
        assert vram.bytes_read == vram.reads * _stride(store)
        demand = sample.decode.gpu_demand(1, report.gpu.share < 1)
        assert demand.vram == vram.hits / 60 and 0 <= demand.below.hit <= 1
    first = values["warm"][0]["decode"]["vram"]
    assert first["hits"] == report.warm[0].decode.vram.hits  # type: ignore[union-attr]
    assert (first["bytes_read"] > 0 or split == "hybrid") == (slots < 48)
    spec = load_machine(machine)
    expected = GpuDemand.expected(report.gpu.curve, slots / 48, report.slots / 48)
    decode = values["compared"]["warm decode, per token"]
    model = model_cost(Store.open(store))
    cost = gpu_decode_cost(model, spec, expected, 9 + 2, hybrid=split == "hybrid")
    assert decode["predicted_s"] == pytest.approx(cost.total_s)
    for item in values["compared"].values():
        assert sum(item[f"{name}_s"] for name in ("hits", "link", "drive", "device")) == pytest.approx(
            item["measured_s"] - item["predicted_s"]
        )
        assert "processor_s" not in item
    text = "\n".join(report.lines())
    assert "VRAM hits" in text and "copied/token" in text
    assert "of it free" not in text and "VRAM hits" in report.page().html()


def test_a_gpu_is_not_compared_with_a_machine_without_one(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = tmp_path / "m.toml"
    machine.write_text(MACHINE)
    options = _on_a_device(store, monkeypatch, 12)
    report = bench(store, machine=machine, prompt_tokens=4, max_tokens=3, warm=1, **options)
    assert not report.comparisons and any("knows no GPU" in line for line in report.lines())
    assert report.to_dict()["vram"]["expected_hit_rate"] > 0


def test_every_run_on_a_gpu_ends_beside_the_plan_of_a_gpu(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = _on_a_device(store, monkeypatch, 12)
    monkeypatch.chdir(tmp_path)
    for text, count in ((MACHINE + GPU, 2), (MACHINE, 0)):
        Path("machine.toml").write_text(text)
        with Engine(store, RuntimeOptions(**options)) as engine:
            list(engine.generate(range(3, 36), max_tokens=18, temperature=0.0, ignore_eos=True))
            compared = engine.summary().to_dict()["compared"]
        assert len(compared) == count
        assert all(set(item) >= {"link_s", "device_s"} for item in compared.values())
