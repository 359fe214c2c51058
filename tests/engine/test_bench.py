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
from offload.engine.engine import ram_for_share
from offload.errors import UsageError
from offload.store import Store
from offload.tune.hits import curve_of_trace
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
