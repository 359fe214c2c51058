"""A domain's atlas as `--profile`: slots are filled at load, nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import cli
import offload
from offload.cache.policy import CacheShape
from offload.cache.trace import Trace, TraceRecorder
from offload.engine.engine import ram_for_share
from offload.errors import UsageError

PROMPT = "some code for the model to read"


def run(*arguments: object) -> dict[str, object]:
    done = CliRunner().invoke(cli.cli, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}


@pytest.fixture(scope="module")
def traces(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("domains")
    for domain in ("code", "prose"):
        (folder / "texts" / domain).mkdir(parents=True)
        (folder / "texts" / domain / "a.txt").write_text(f"some {domain} for the model to read " * 3)
    run("routing", "atlas", store, "--prompts", folder / "texts", "--context", 64, "--traces", folder, "--json")
    return folder


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_slots_hold_what_the_domain_uses_most(store: Path, traces: Path, share: float) -> None:
    trace = Trace.load(traces / "code.npz")
    counts = np.stack([np.bincount(trace.experts[:, layer].ravel(), minlength=16) for layer in range(3)])
    ram = ram_for_share(store, share, context=64)
    with offload.load(store, profile=traces / "code.npz", context=64, ram=ram) as engine:
        residency = engine._executor.ram.residency
        held = np.zeros((3, 16), bool)
        for layer, expert in residency.contents():
            held[layer, expert] = True
        residency.check()
        assert held.sum() == min(residency.slots, (counts > 0).sum())
        assert counts[held].min() >= counts[~held].max()
        assert engine.counters()["ram"]["misses"] == 0  # type: ignore[index]
        assert any("were read at the start" in line for line in engine.describe())


@pytest.mark.parametrize("policy", ["lru", "lfu", "ema", "ema+tokens"])
def test_fewer_misses_and_the_same_tokens(store: Path, traces: Path, policy: str) -> None:
    seen = {}
    for profile in (None, traces / "code.npz"):
        ram = ram_for_share(store, 0.6, context=64)
        with offload.load(store, profile=profile, policy=policy, context=64, ram=ram) as engine:
            steps = engine.generate(engine.encode(PROMPT), max_tokens=12, temperature=0.5, seed=3)
            tokens = [step.token_id for step in steps]
            seen[profile is not None] = tokens, engine.summary().telemetry.ram.misses, engine.plan.slots
    (cold, cold_misses, slots), (warm, warm_misses, other_slots) = seen[False], seen[True]
    assert warm == cold and abs(slots - other_slots) <= 2  # the process itself grows a little
    assert warm_misses < cold_misses


def test_the_command_takes_it(store: Path, traces: Path) -> None:
    profile = traces / "code.npz"
    values = run("generate", store, "-p", PROMPT, "-n", 3, "--context", 64, "--profile", profile, "--json")
    assert "were read at the start" in str(values["stderr"]) and values["completion_tokens"] == 3


def test_a_toml_profile_names_the_trace_beside_it(store: Path, traces: Path) -> None:
    (traces / "code.toml").write_text('warm = "code.npz"\npolicy = "lfu"\n')
    with offload.load(store, profile=traces / "code.toml", context=64) as engine:
        assert engine.options.policy == "lfu" and engine._executor.ram.residency.resident > 10


def test_a_recorded_run_begins_cold_and_says_so(store: Path, traces: Path, tmp_path: Path) -> None:
    with offload.load(store, profile=traces / "code.npz", context=64, trace=tmp_path / "t.npz") as engine:
        assert engine._executor.ram.residency.resident == 0
        assert any("begins with empty slots" in note for note in engine.counters()["notes"])  # type: ignore[union-attr]


def test_the_routing_of_another_model_is_refused(store: Path, tmp_path: Path) -> None:
    TraceRecorder(CacheShape(2, 16, 4)).trace().save(tmp_path / "other.npz")
    with pytest.raises(UsageError, match="another model"):
        offload.load(store, profile=tmp_path / "other.npz", context=64)
    with pytest.raises(UsageError, match="there is no trace"):
        offload.load(store, warm=tmp_path / "absent.npz", context=64)
