"""The benchmark of `tune`: what its sweep covers, and a ratio of runs that lie beside each other."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import tune_wrong
from offload.engine.options import LIVE_POLICIES, RuntimeOptions
from offload.engine.tuning import Run, Trial


def machine(seen: list[RuntimeOptions], slowing: float = 1.0) -> Run:
    """Runs whose speed depends on the options, and on how many were before them."""

    def run(options: RuntimeOptions, record: bool) -> Trial:
        seconds = slowing ** len(seen)
        seconds *= 1 + LIVE_POLICIES.index(options.policy) / 10 + 0.05 * options.prefetch
        seconds *= (2 if options.threads == 4 else 1) * (1.5 if options.readers == 4 else 1)
        seen.append(options)
        return Trial(options, (seconds, 1.1 * seconds, 0.9 * seconds), ((1,),), 6)

    return run


def test_the_sweep_tries_everything_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_wrong, "usable_cpus", lambda: 8)
    seen: list[RuntimeOptions] = []
    trials = tune_wrong.sweep(machine(seen), 64)
    assert [trial.options for trial in trials] == seen
    assert len(seen) == len(set(seen)) == 2 * len(LIVE_POLICIES) + 3 and {o.context for o in seen} == {64}
    assert {(o.policy, o.prefetch) for o in seen[:-3]} == {(p, a) for p in LIVE_POLICIES for a in (True, False)}
    best = RuntimeOptions(context=64, policy=LIVE_POLICIES[0], prefetch=False)
    assert seen[-3:] == [replace(best, threads=4), replace(best, readers=4), replace(best, readers=16)]
    monkeypatch.setattr(tune_wrong, "usable_cpus", lambda: 1)
    assert len(tune_wrong.neighbours(best)) == 2


def test_a_machine_that_slows_down_does_not_tell_against_the_later_run() -> None:
    """Ten per cent slower with every run: one after the other the second seems so much worse, in turns 1.1 at most."""
    same = RuntimeOptions()
    seen: list[RuntimeOptions] = []
    pairs = tune_wrong.in_turns(machine(seen, 1.1), same, same)
    assert len(seen) == 2 * tune_wrong.TURNS
    one, other = (tune_wrong.middle(side) for side in zip(*pairs, strict=True))
    assert 1 <= one / other <= 1.1 + 1e-9
    half = RuntimeOptions(threads=4)
    fast, slow = (tune_wrong.middle(side) for side in zip(*tune_wrong.in_turns(machine([]), same, half), strict=True))
    assert fast / slow == pytest.approx(2.0) and fast == pytest.approx(1 / machine([])(same, False).seconds[0])
    unlike = Trial(same, (1.0, 4.0), ((1,),), 6), Trial(same, (2.0, 3.0, 9.0), ((1,),), 6)
    assert tune_wrong.middle(unlike) == pytest.approx(1 / 3)
