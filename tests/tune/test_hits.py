"""Hit curves: presets come from the generator, traces from the simulator."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from convert.synthetic import TINY_CONFIG
from offload.cache.policy import CacheShape
from offload.cache.simulator import replay
from offload.cache.trace import Trace
from offload.config import ModelConfig
from offload.errors import UsageError
from offload.tune.cost import distinct_experts
from offload.tune.hits import CURVES, curve_of_trace, likeness, measured_curve
from offload.tune.layer_clock import Demand
from offload.tune.synthetic import synthetic_trace

SHAPE = CacheShape(12, 256, 8)


def test_curves_rise_and_end_where_they_must() -> None:
    for curve in CURVES.values():
        points = [curve.at(step / 200) for step in range(201)]
        assert points == sorted(points) and points[0] == 0 and points[-1] == 1
    assert CURVES["uniform"].at(0.37) == pytest.approx(0.37)
    assert CURVES["uniform"].at(0.2) < CURVES["flat"].at(0.2) < CURVES["local"].at(0.2)


@pytest.mark.parametrize(("share", "hit"), [(0.055, 0.39), (0.10, 0.53), (0.20, 0.71), (0.35, 0.85), (0.50, 0.92)])
def test_flat_preset_meets_the_published_figures(share: float, hit: float) -> None:
    assert CURVES["flat"].at(share) == pytest.approx(hit, abs=0.01)


def test_presets_foretell_reads_ahead() -> None:
    trace = synthetic_trace("flat", SHAPE, sessions=6, tokens=300)
    result = replay(trace, "ema", 1536, prefetch_depth=1)
    demand, demands = CURVES["flat"].demand(0.5), result.decode_hits + result.decode_misses
    assert demand.ahead == pytest.approx(result.decode_ahead / demands, abs=0.001)
    assert demand.hit == pytest.approx(CURVES["flat"].at(0.5)) and demand.prefetch_depth == 1
    issued = (result.decode_reads - result.decode_misses) / demands
    assert demand.wasted == pytest.approx(issued - demand.ahead, abs=0.001)
    for share in (0.0, 0.01, 0.5, 0.9, 1.0):
        found = CURVES["local"].demand(share)
        assert 0 <= found.ahead <= 1 - found.hit and found.wasted >= 0
    assert CURVES["local"].demand(1.0) == Demand(1.0, prefetch_depth=1)
    assert replace(CURVES["local"], prefetch_depth=None).demand(0.3) == Demand(CURVES["local"].at(0.3))


def test_presets_are_what_the_generator_and_the_simulator_say() -> None:
    trace = synthetic_trace("local", SHAPE, sessions=6, tokens=300)
    assert replay(trace, "ema", 614).hit_rate == pytest.approx(CURVES["local"].at(0.2), abs=0.002)


def test_local_routing_has_the_measured_heat() -> None:
    """A 256-expert model in service: the top 25% of the experts get 58% of the picks, a token keeps 29-36%."""
    experts = synthetic_trace("local", SHAPE, sessions=6, tokens=300).experts.astype(int)
    heat = np.mean([np.sort(np.bincount(experts[:, n].ravel(), minlength=256))[-64:].sum() for n in range(12)])
    assert 0.55 < heat / experts[:, 0].size < 0.70
    pairs = [(a, b) for n in (0, 3, 6, 9) for a, b in zip(experts[1:, n], experts[:-1, n], strict=True)]
    kept = [len(set(a) & set(b)) / 8 for a, b in pairs]
    assert 0.28 < float(np.mean(kept)) < 0.38
    groups = [len({e // 32 for e in row}) for row in experts[:, 5].tolist()]
    assert max(groups) <= 4  # the router keeps four of eight groups
    assert all(len(set(row)) == 8 for row in experts[:200, 3].tolist())


def test_a_recorded_trace_gives_its_own_curve(tmp_path: Path) -> None:
    config = ModelConfig.from_hf(TINY_CONFIG)
    shape = CacheShape(len(config.moe_layers), config.n_routed_experts, config.num_experts_per_tok)
    trace = synthetic_trace("flat", shape, sessions=2, tokens=40, groups=(4, 2))
    trace.save(tmp_path / "t.npz")
    curve = curve_of_trace(tmp_path / "t.npz", config, prefetch_depth=None)
    assert "t.npz" in curve.name and curve.demand(0.5) == Demand(curve.at(0.5))
    assert curve.at(0.5) == pytest.approx(replay(trace, "ema+tokens", shape.keys // 2).hit_rate)
    found = curve_of_trace(tmp_path / "t.npz", config, prefetch_depth=2).demand(0.5)
    result = replay(trace, "ema+tokens", shape.keys // 2, prefetch_depth=2)
    demands = result.decode_hits + result.decode_misses
    assert found.hit + found.ahead == pytest.approx(result.decode_hit_rate) and found.prefetch_depth == 2
    assert found.ahead == pytest.approx(result.decode_ahead / demands) and found.ahead > 0 < found.wasted
    assert found.reads == pytest.approx(result.decode_reads / demands)
    other = synthetic_trace("flat", CacheShape(2, 16, 4), sessions=1, tokens=5, groups=(4, 2))
    other.save(tmp_path / "o.npz")
    with pytest.raises(UsageError, match="the trace is of 2 layers"):
        curve_of_trace(tmp_path / "o.npz", config)


def test_prompts_fill_the_cache_and_do_not_count() -> None:
    """Two tokens at once, then four that use experts the first brought in or did not."""
    shape = CacheShape(1, 8, 1)
    experts = np.array([[[0]], [[1]], [[0]], [[2]], [[1]], [[0]]], np.uint16)
    trace = Trace(shape, np.zeros(6, np.int32), np.array([2, 1, 1, 1, 1], np.int32), experts)
    result = replay(trace, "lru", 4)
    assert (result.events.misses, result.decode_hits, result.decode_misses) == (3, 3, 1)
    assert measured_curve(trace, "lru", "t", [0.5]).at(0.5) == 0.75
    prompt_only = replace(trace, steps=np.array([6], np.int32))
    assert replay(prompt_only, "lru", 4).decode_hit_rate is None
    assert measured_curve(prompt_only, "lru", "t", [0.5]).at(0.5) == 0.5


def test_unknown_preset_and_groups() -> None:
    with pytest.raises(UsageError, match="known: local, flat"):
        synthetic_trace("hot", SHAPE)
    with pytest.raises(UsageError, match="8 groups"):
        synthetic_trace("flat", CacheShape(1, 10, 2))
    assert measured_curve(synthetic_trace("flat", CacheShape(1, 16, 4), tokens=3), "lru", "x").at(0.0) == 0


def test_likeness_is_what_makes_a_passage_use_fewer_experts() -> None:
    """As many experts as the trace uses over the passage it was taken from; close over others."""
    config = SimpleNamespace(n_routed_experts=64, num_experts_per_tok=6)
    trace = synthetic_trace("local", CacheShape(3, 64, 6), sessions=2, tokens=512, groups=(8, 4))
    alike = likeness(trace)
    for passage, tolerance in ((1, 0.0), (16, 0.3), (64, 0.0), (256, 0.3)):
        ends = range(passage, 1025, passage)
        used = [np.unique(row).size for end in ends for row in trace.experts[end - passage : end].transpose(1, 0, 2)]
        assert distinct_experts(config, passage, alike) == pytest.approx(np.mean(used), rel=tolerance + 1e-6)  # type: ignore[arg-type]
    same = replace(trace, experts=np.repeat(trace.experts[:1], len(trace.tokens), axis=0))
    assert distinct_experts(config, 64, likeness(same)) == pytest.approx(6)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    unlike = np.array([[rng.permutation(64)[:6] for _ in range(3)] for _ in range(1024)], np.uint16)
    assert likeness(replace(trace, experts=unlike), passage=16) > 200
    everything = np.arange(1024 * 18).reshape(1024, 3, 6) % 64
    assert likeness(replace(trace, experts=everything.astype(np.uint16))) == math.inf
