"""`--prefer-resident` end to end: off it changes nothing, on it reads less, says so, and stays within its rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import cli
import offload
from benchmarks.embedded.prefer_resident import load
from offload.cache.trace import Trace
from offload.engine.engine import ram_for_share
from offload.engine.routing import explain
from offload.errors import UsageError

PROMPT = [0, 17, 301, 5]


def generate(store: Path, margin: float | None, share: float = 0.4, **options: object):  # type: ignore[no-untyped-def]
    """With the same slots every time, nothing learned, no reads ahead, which depend on timing: misses are compared."""
    with load(store, share, margin, context=64, **options) as engine:
        ids = [step.token_id for step in engine.generate(PROMPT, max_tokens=24, temperature=0.0, ignore_eos=True)]
        return ids, engine.summary()


def test_a_margin_of_zero_is_exact_and_a_large_one_reads_less(store: Path) -> None:
    exact, plain = generate(store, None)
    same, zero = generate(store, 0.0)
    assert same == exact and zero.telemetry.ram.misses == plain.telemetry.ram.misses
    assert zero.telemetry.changed_choices == 0 and plain.telemetry.choices == 0
    _, wide = generate(store, 2.0)
    assert wide.telemetry.ram.misses < plain.telemetry.ram.misses
    assert 0 < wide.telemetry.changed_choices < wide.telemetry.choices
    assert "choices changed to resident experts" in wide.line() and "choices changed" not in plain.line()


def test_with_everything_resident_routing_is_exact_whatever_the_margin(store: Path) -> None:
    texts = torch.randint(512, (4, 60), generator=torch.Generator().manual_seed(1)).tolist()
    with offload.load(store, context=64, prefer_resident=5.0) as engine:
        for text in texts:  # passes that are too long to be rerouted
            engine.logits(text)
        assert engine.counters()["ram"]["misses"] == engine.plan.experts  # type: ignore[index]
        ids = [step.token_id for step in engine.generate(PROMPT, max_tokens=16, temperature=0.0, ignore_eos=True)]
        telemetry = engine.summary().telemetry
    with offload.load(store, context=64) as engine:
        assert ids == [step.token_id for step in engine.generate(PROMPT, max_tokens=16, temperature=0, ignore_eos=True)]
    assert telemetry.choices > 0 and telemetry.changed_choices == 0


def test_explanations_and_their_trace_are_of_exact_routing(store: Path, tmp_path: Path) -> None:
    ids = [0, 17, 301]
    ram = ram_for_share(store, 0.4, context=64)
    with offload.load(store, context=64, ram=ram, prefer_resident=5.0, trace=tmp_path / "t.npz") as engine:
        found = explain(engine, ids)
    with offload.load(store, context=64) as engine:
        right = explain(engine, ids)
    assert found == right
    trace = Trace.load(tmp_path / "t.npz")
    assert trace.header["prefer_resident"] == 5.0
    for one in found.routing:
        assert [c.expert for c in one.chosen] == trace.experts[one.position, one.layer - 1].tolist()


def test_the_command_announces_it(store: Path) -> None:
    base = ["generate", str(store), "--prompt-ids", "0,5,7", "-n", "8", "--context", "64", "--json"]
    base += ["--ignore-eos", "--usage", "off"]
    CliRunner().invoke(cli.cli, base, catch_exceptions=False)  # what is made once counts to the process
    command = [*base, "--ram", str(ram_for_share(store, 0.4, context=64) + (512 << 10))]
    done = CliRunner().invoke(cli.cli, [*command, "--prefer-resident", "1.5"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "prefer-resident 1.5" in done.stderr and "not that of exact routing" in done.stderr
    telemetry = json.loads(done.stdout.splitlines()[-1])["telemetry"]
    assert telemetry["choices"] == (3 + 7) * 4 * 3 and telemetry["changed_choices"] > 0
    done = CliRunner().invoke(cli.cli, command, catch_exceptions=False)
    assert "prefer-resident" not in done.stderr


@pytest.mark.parametrize("margin", [-0.1, float("nan"), float("inf"), True])
def test_impossible_margins_are_refused(store: Path, margin: float) -> None:
    with pytest.raises(UsageError, match="prefer_resident is"):
        offload.load(store, prefer_resident=margin)


def test_logits_one_token_at_a_time_are_those_of_a_chunk(store: Path) -> None:
    with offload.load(store, context=64, kernels="reference") as engine:
        whole, single = engine.logits(PROMPT * 4), engine.logits(PROMPT * 4, chunk=1)
    assert torch.allclose(whole, single, rtol=1e-3, atol=1e-3)
