"""Tuning keeps what is faster with the same tokens, and writes a profile the runtime reads."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

import cli
from offload.cache.policy import CacheShape
from offload.cache.simulator import replay
from offload.cache.trace import Prefetch
from offload.engine.engine import ram_for_share
from offload.engine.options import LIVE_POLICIES, RuntimeOptions, resolve_options
from offload.engine.tune_page import SHARES
from offload.engine.tuning import (
    Trial,
    TuneReport,
    depth_candidates,
    half_life_candidates,
    measurably_faster,
    memory_candidates,
    policy_candidates,
    prefetch_candidates,
    promising,
    reader_candidates,
    thread_candidates,
    tune,
)
from offload.errors import BudgetError, OffloadError, UsageError
from offload.tune.hits import measured_curve
from offload.tune.synthetic import synthetic_trace

TRACE = synthetic_trace("local", CacheShape(2, 32, 4), sessions=2, tokens=40, groups=(4, 2))


def fake(speed, tokens=lambda options: ((1, 2),)):  # type: ignore[no-untyped-def]
    """A runner whose speed depends on the options alone."""

    def run(options: RuntimeOptions, record: bool) -> Trial:
        return Trial(options, (1 / speed(options),), tokens(options), 6, TRACE if record else None)

    return run


def test_a_wrong_profile_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.engine.tuning.usable_cpus", lambda: 8)
    wrong = tmp_path / "wrong.toml"
    wrong.write_text('ram = "100MiB"\npolicy = "lru"\nthreads = 1\nallow_slow = true\n')

    def speed(o: RuntimeOptions) -> float:
        return (5 if o.ram is None else 1) * (1.2 if o.policy != "lru" else 1) * {7: 3, 8: 2.95, 4: 2}.get(o.threads, 1)

    report = tune("unused", output=tmp_path / "p.toml", profile=wrong, run=fake(speed))
    found = resolve_options({}, tmp_path / "p.toml")
    assert (found.ram, found.allow_slow) == (None, False) and found.policy != "lru"
    # Seven threads are faster than eight by less than what counts as more than noise.
    assert found.threads == 8
    assert report.after.tok_s > 10 * report.before.tok_s
    assert any("kept" in line for line in report.lines()) and report.to_dict()["options"]["threads"] == 8


@pytest.mark.parametrize("seed", range(8))
def test_a_wrong_profile_ends_near_the_best_of_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Speeds from a formula whose options depend on each other; the sweep tries every combination."""
    monkeypatch.setattr("offload.engine.tuning.usable_cpus", lambda: 8)
    rng = random.Random(seed)
    best_threads, drive, ahead = rng.choice((4, 7, 8)), rng.uniform(0.2, 4), rng.uniform(0.8, 1.15)
    best_readers, memory = rng.choice((4, 8, 16)), rng.choice((24, 40, 48))
    misses: dict[tuple[str, int], int] = {}

    def run(o: RuntimeOptions, record: bool) -> Trial:
        slots = memory if o.ram is None else 6
        if (o.policy, slots) not in misses:
            misses[o.policy, slots] = replay(TRACE, o.policy, slots).events.misses
        threads = o.threads or 8
        compute = 40 * (1 + 0.08 * abs(threads - best_threads))
        # A reader takes time of a processor whose threads are all busy.
        reading = misses[o.policy, slots] * drive * (1 + 0.05 * abs(o.readers - best_readers) / 4)
        reading *= (ahead if o.prefetch else 1) * (1.05 if threads == 8 else 1)
        seconds = compute + reading
        return Trial(o, (seconds, 1.1 * seconds, 0.9 * seconds), ((1, 2),), slots, TRACE if record else None)

    wrong = tmp_path / "wrong.toml"
    wrong.write_text('ram = "100MiB"\npolicy = "lru"\nthreads = 1\nreaders = 1\nallow_slow = true\n')
    report = tune("unused", output=tmp_path / "p.toml", profile=wrong, run=run)
    grid = itertools.product((None, 100 << 20), LIVE_POLICIES, (1, 4, 7, 8), (1, 4, 8, 16), (True, False))
    sweep = [
        run(RuntimeOptions(ram=ram, policy=policy, threads=threads, readers=readers, prefetch=prefetch), False).tok_s
        for ram, policy, threads, readers, prefetch in grid
    ]
    assert report.after.tok_s >= 0.95 * max(sweep), (report.after.options, list(report.lines()))
    assert report.after.tok_s > report.before.tok_s
    assert len(report.steps) < len(sweep) / 8


def test_small_gains_count_where_every_prompt_is_faster() -> None:
    def trial(*seconds: float) -> Trial:
        return Trial(RuntimeOptions(), seconds, ((1,),), 6)

    best = trial(1.0, 1.1, 0.9)
    assert measurably_faster(trial(0.98, 1.08, 0.88), best)
    assert not measurably_faster(trial(0.98, 1.08, 0.91), best)
    assert not measurably_faster(trial(0.999, 1.099, 0.899), best)
    assert not measurably_faster(trial(0.98), trial(1.0)) and measurably_faster(trial(0.96), trial(1.0))


def test_noise_is_not_a_gain_and_given_options_stay(tmp_path: Path) -> None:
    report = tune("unused", output=tmp_path / "p.toml", run=fake(lambda o: 1.02 if o.threads else 1.0))
    assert report.after is report.before and resolve_options({}, tmp_path / "p.toml") == RuntimeOptions()
    before = Trial(RuntimeOptions(ram=10**9, policy="lru"), (1.0,), ((1,),), 16, TRACE)
    stages = (memory_candidates, policy_candidates, thread_candidates, prefetch_candidates, reader_candidates)
    assert not any(stage(before, {"ram", "policy", "threads", "prefetch", "readers"}) for stage in stages)
    resident = replace(before, slots=64)
    assert not prefetch_candidates(resident, set()) and not reader_candidates(resident, set())
    assert [changes for _, changes in depth_candidates(before, set())] == [{"prefetch_depth": 0}, {"prefetch_depth": 2}]
    without = replace(before, options=replace(before.options, prefetch=False))
    assert not any(depth_candidates(*given) for given in ((before, {"prefetch_depth"}), (resident, ()), (without, ())))
    assert "ram: what is free" in dict(memory_candidates(before, set()))


def test_other_tokens_are_a_defect(tmp_path: Path) -> None:
    run = fake(lambda o: 1.0, lambda o: ((1, 3),) if o.policy == "lru" else ((1, 2),))
    with pytest.raises(OffloadError, match="the tokens depend on policy"):
        tune("unused", output=tmp_path / "p.toml", run=run)
    assert not (tmp_path / "p.toml").exists()


@pytest.mark.parametrize("rounded", [False, True])
def test_a_wrong_split_is_mended_where_that_changes_no_token(tmp_path: Path, rounded: bool) -> None:
    """Processor and device may round differently: then the split stays, which is no defect."""

    def tokens(o: RuntimeOptions) -> tuple[tuple[int, ...], ...]:
        return ((1, 3 if rounded and o.split == "hybrid" else 2),)

    def speed(o: RuntimeOptions) -> float:
        return 2 if o.split == "hybrid" else 1

    report = tune("unused", output=tmp_path / "p.toml", vram="8GiB", run=fake(speed, tokens))
    assert resolve_options({}, tmp_path / "p.toml").split == ("gpu" if rounded else "hybrid")
    assert any("other tokens, by rounding" in line for line in report.lines()) == rounded
    fixed = tune("unused", output=tmp_path / "q.toml", vram="8GiB", split="gpu", run=fake(speed, tokens))
    assert not any("split" in step.what for step in fixed.steps)
    report = tune("unused", output=tmp_path / "r.toml", run=fake(speed, tokens))
    assert not any("split" in step.what for step in report.steps)


def test_a_candidate_without_room_is_dropped(tmp_path: Path) -> None:
    def run(options: RuntimeOptions, record: bool) -> Trial:
        if options.policy == "lru":
            raise BudgetError("no room")
        return Trial(options, (1.0,), ((1,),), 16, TRACE)

    report = tune("unused", output=tmp_path / "p.toml", run=run)
    assert any(step.note == "no room" and not step.kept for step in report.steps)


def test_policies_are_ranked_by_replay() -> None:
    few = Trial(RuntimeOptions(policy="lru"), (1.0,), ((1,),), 6, TRACE)
    others = [("lfu", None), ("ema", None), ("ema", 3.0), ("ema+tokens", 5.0)]
    found = promising(few, others)
    assert found != []  # below one token's working set lru has no hits at all
    misses = [replay(TRACE, policy, 6, half_life=half_life).decode_misses for policy, half_life in found]
    assert misses == sorted(misses) and misses[-1] <= 1.02 * replay(TRACE, "lru", 6).decode_misses
    assert promising(replace(few, slots=64), others) == []
    # Reads ahead of the recorded setting do not count for it.
    ahead = [Prefetch(step, 0, kind, 0, expert) for step in range(9) for expert in range(4) for kind in (0, 1)]
    header = {"policy": "lru", "slots": 6, "half_life": None}
    assert promising(replace(few, trace=replace(TRACE, prefetches=ahead, header=header)), others) == found


def test_half_lives_are_halved_and_doubled_where_that_misses_no_more() -> None:
    long = Trial(RuntimeOptions(policy="ema", half_life=64), (1.0,), ((1,),), 12, TRACE)
    misses = {h: replay(TRACE, "ema", 12, half_life=h).decode_misses for h in (16, 32, 64, 128)}
    assert misses[16] < misses[32] < misses[64] <= misses[128] <= 1.02 * misses[64] < 1.02 * misses[128]
    found = half_life_candidates(long, set())
    assert found == [("half-life 32", {"half_life": None}), ("half-life 128", {"half_life": 128})]  # 32 is its own
    own = replace(long, options=RuntimeOptions(policy="ema"))
    assert misses[64] > 1.02 * misses[32] and half_life_candidates(own, set()) == [("half-life 16", {"half_life": 16})]
    lru = replace(long, options=RuntimeOptions(policy="lru"))
    resident = replace(long, slots=64)
    assert not any(half_life_candidates(*case) for case in ((long, {"half_life"}), (lru, set()), (resident, set())))
    # Another policy comes with its own half-life, unless one was given: then it must have one.
    free = [changes for _, changes in policy_candidates(long, set())]
    assert len(free) > 1 and all(changes["half_life"] is None for changes in free)
    given = [changes for _, changes in policy_candidates(long, {"half_life"})]
    assert given == [{"policy": "ema+tokens", "half_life": 64}]


def test_what_was_found_is_in_the_profile(tmp_path: Path) -> None:
    def speed(o: RuntimeOptions) -> float:
        return (2 if o.half_life else 1) * (1.5 if o.prefetch_depth == 2 else 1) * (1.1 if o.prefill_chunk else 1)

    report = tune("unused", output=tmp_path / "p.toml", prefill_chunk=1024, run=fake(speed))
    found = resolve_options({}, tmp_path / "p.toml")
    assert found.half_life and (found.prefetch_depth, found.prefill_chunk) == (2, 1024), list(report.lines())
    values = report.to_dict()["options"]
    assert {name: values[name] for name in ("half_life", "prefetch_depth", "prefill_chunk")} == {
        "half_life": found.half_life,
        "prefetch_depth": 2,
        "prefill_chunk": 1024,
    }


def test_real_runs(store: Path, tmp_path: Path) -> None:
    ram = ram_for_share(store, 0.5, context=128) + (64 << 20)
    profile = tmp_path / "p.toml"
    profile.write_text(f'ram = {ram}\npolicy = "lru"\n')
    arguments = ["tune", str(store), "--profile", str(profile), "-o", str(tmp_path / "out.toml"), "-n", "3"]
    arguments += ["--context", "128", "--kernels", "reference", "--threads", "1", "--html", str(tmp_path / "t.html")]
    arguments += ["--prefill-chunk", "96"]
    done = CliRunner().invoke(cli.cli, arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "before:" in done.stdout and "the same tokens" in done.stdout
    found = resolve_options({}, tmp_path / "out.toml")
    assert (found.context, found.kernels, found.threads) == (128, "reference", 1)
    assert found.prefill_chunk == 96
    assert "Hits by slots" in (tmp_path / "t.html").read_text()


def test_the_hit_curve_has_the_half_life_that_was_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trace = replace(TRACE, header={"policy": "ema+tokens", "half_life": 7.0, "slots": 6})
    drawn = {}

    def spy(*given, **options):  # type: ignore[no-untyped-def]
        drawn[given[1]] = found = measured_curve(*given, **options)
        return found

    monkeypatch.setattr("offload.engine.tune_page.measured_curve", spy)
    before = Trial(RuntimeOptions(half_life=7.0), (1.0,), ((1,),), 6, trace)
    for policy, half_life in (("ema+tokens", 3.0), ("ema+tokens", None), ("ema", 4.0)):
        after = replace(before, options=RuntimeOptions(policy=policy, half_life=half_life))
        assert "Hits by slots" in TuneReport(before, after, [], tmp_path / "p.toml").page().html()
        for name in ("ema+tokens", "ema"):
            expected = measured_curve(trace, name, "", SHARES, half_life=half_life if name == policy else None)
            assert drawn[name].hits == expected.hits
    curves = {h: measured_curve(trace, "ema+tokens", "", SHARES, half_life=h).hits for h in (3.0, 7.0, None)}
    assert len(set(curves.values())) == 3


def test_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no folder"):
        tune("unused", output=tmp_path / "none" / "p.toml")
    (tmp_path / "one.txt").write_text("one\n")
    with pytest.raises(UsageError, match="at least two"):
        tune("unused", output=tmp_path / "p.toml", prompts=tmp_path / "one.txt")
