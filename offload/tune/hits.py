"""Expected hit rate by the share of experts that have a slot.

Owns the curves: from a recorded trace by replaying it, else two presets. Must not know bytes or machines.

The presets are replays of `synthetic` traces (12 layers x 256 experts, top-8 of 4 of 8 groups, six conversations of 300
tokens, cold start included) through the `ema` policy, with experts read ahead as a run's defaults do. `flat` meets the
published figures for a model with balanced experts (39% at 5.5% of the experts, 53% at 10%, 71% at 20%, 85% at 35%,
92% at 50%); `local` is a model with the heat and the lag profile of a 256-expert model measured in service. No routing
of DeepSeek-V3 itself is public, so a plan shows both and your own trace is better than either. `uniform` is routing
without any favourites.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from offload.cache.lookahead import EARLY_ROUTERS
from offload.cache.policy import LEARNING
from offload.cache.simulator import Result, replay
from offload.cache.trace import Trace
from offload.config import ModelConfig
from offload.errors import UsageError
from offload.tune.layer_clock import Demand

_SHARES = (0.03125, 0.055, 0.10, 0.15, 0.20, 0.30, 0.40, 0.50, 0.70, 0.85)


ALIKE = 42.0
"""How alike the tokens of a text are, for the presets: as in DeepSeek-V2-Lite's routing, over passages of 64 tokens."""

PASSAGE = 64
"""Tokens over which a trace's own is taken."""


@dataclass(frozen=True)
class HitCurve:
    """Hit rate at rising shares of the experts; straight lines between the points, from (0, 0) to (1, 1)."""

    name: str
    shares: tuple[float, ...]
    hits: tuple[float, ...]
    alike: float = ALIKE
    """What `cost.distinct_experts` needs to know of a text: infinite where its tokens have nothing in common."""
    ahead: tuple[float, ...] = ()
    """At the same shares: the part of the demands for whose expert a read has begun before; none if empty."""
    wasted: tuple[float, ...] = ()
    """And reads ahead that no demand follows, per demand."""
    prefetch_depth: int | None = EARLY_ROUTERS
    """What both are for: layers ahead for which routers are applied early; None: nothing is read ahead."""

    def at(self, share: float) -> float:
        """The hit rate, 0..1, when `share` (0..1) of the experts have a slot."""
        return self._between(share, self.hits, 0.0, 1.0)

    def demand(self, share: float) -> Demand:
        """What becomes of the demands when `share` (0..1) of the experts have a slot."""
        if self.prefetch_depth is None or not self.ahead:
            return Demand(self.at(share), prefetch_depth=self.prefetch_depth or 0)
        hit = self.at(share)
        ahead, wasted = (self._between(share, of, of[0], 0.0) for of in (self.ahead, self.wasted))
        return Demand(hit, min(ahead, 1 - hit), wasted, self.prefetch_depth)

    def _between(self, share: float, values: tuple[float, ...], first: float, last: float) -> float:
        """`values` at the shares, `first` before them and `last` after."""
        shares, ends = (0.0, *self.shares, 1.0), (first, *values, last)
        if share <= 0:
            return first
        if share >= 1:
            return last
        right = bisect_left(shares, share)
        x0, x1, y0, y1 = shares[right - 1], shares[right], ends[right - 1], ends[right]
        return y0 + (y1 - y0) * (share - x0) / (x1 - x0)


CURVES = {
    "local": HitCurve(
        "local",
        _SHARES,
        (0.332, 0.479, 0.632, 0.737, 0.804, 0.886, 0.929, 0.952, 0.972, 0.980),
        ahead=(0.001, 0.001, 0.001, 0.002, 0.002, 0.003, 0.004, 0.005, 0.008, 0.012),
        wasted=(0.0007, 0.0006, 0.0005, 0.0007, 0.0008, 0.0013, 0.0016, 0.0021, 0.0025, 0.0012),
    ),
    "flat": HitCurve(
        "flat",
        _SHARES,
        (0.223, 0.389, 0.532, 0.638, 0.714, 0.817, 0.881, 0.920, 0.963, 0.976),
        ahead=(0.002, 0.001, 0.001, 0.002, 0.002, 0.003, 0.004, 0.005, 0.008, 0.011),
        wasted=(0.0008, 0.0008, 0.0007, 0.0006, 0.0008, 0.0010, 0.0013, 0.0016, 0.0021, 0.0015),
    ),
    "uniform": HitCurve("uniform", (), (), math.inf),
}


POLICY = LEARNING
"""What a recorded trace is replayed with: the runtime's default."""


def curve_of_trace(
    file: str | Path,
    config: ModelConfig,
    policy: str = POLICY,
    prefetch_depth: int | None = EARLY_ROUTERS,
    half_life: float | None = None,
) -> HitCurve:
    """Replay the trace in `file` at several cache sizes. Raises UsageError if it is of another kind of model."""
    trace = Trace.load(file)
    shape = trace.shape
    wanted = (len(config.moe_layers), config.n_routed_experts, config.num_experts_per_tok)
    if (shape.layers, shape.experts, shape.top_k) != wanted:
        raise UsageError(
            f"{file}: the trace is of {shape.layers} layers x {shape.experts} experts, top-{shape.top_k}; "
            f"the model has {wanted[0]} x {wanted[1]}, top-{wanted[2]}"
        )
    if not len(trace.tokens):
        raise UsageError(f"{file}: the trace holds no tokens")
    return measured_curve(trace, policy, Path(file).name, prefetch_depth=prefetch_depth, half_life=half_life)


def measured_curve(
    trace: Trace,
    policy: str,
    name: str,
    shares: Sequence[float] = _SHARES,
    *,
    prefetch_depth: int | None = None,
    **options: Any,
) -> HitCurve:
    """The hit rates of `policy`, which has `options` as `replay` takes them, in decoding; cold misses count.

    A pass of many tokens demands nearly every expert, so prompts only fill the cache. A trace of nothing but such
    passes is replayed token by token. With `prefetch_depth` experts are read ahead as a run with that option would.
    """
    keys = trace.shape.keys
    trace = replace(trace, prefetches=[])  # those of the recorded setting say nothing of others
    if not np.any(trace.steps == 1):
        trace = replace(trace, steps=np.ones(len(trace.tokens), np.int32))
    sizes = sorted({max(trace.shape.top_k, round(share * keys)) for share in shares})
    results = {
        size / keys: replay(trace, policy, size, prefetch_depth=prefetch_depth, **options)
        for size in sizes
        if size < keys
    }
    demands = [_demand(result) for result in results.values()]
    return HitCurve(
        f"trace {name}, {policy}",
        tuple(results),
        tuple(found.hit for found in demands),
        likeness(trace),
        tuple(found.ahead for found in demands) if prefetch_depth is not None else (),
        tuple(found.wasted for found in demands) if prefetch_depth is not None else (),
        prefetch_depth,
    )


def _demand(result: Result) -> Demand:
    """Of the decoding in a replay."""
    demands = max(1, result.decode_hits + result.decode_misses)
    ahead = result.decode_ahead
    wasted = max(0, result.decode_reads - result.decode_misses - ahead)
    return Demand((result.decode_hits - ahead) / demands, ahead / demands, wasted / demands)


def likeness(trace: Trace, passage: int = PASSAGE) -> float:
    """How alike the tokens of the trace's passages are; see `cost.distinct_experts`."""
    shape, length = trace.shape, min(passage, len(trace.tokens))
    ends = range(length, len(trace.tokens) + 1, length)
    used = [np.unique(layer).size for end in ends for layer in trace.experts[end - length : end].transpose(1, 0, 2)]
    share = float(np.mean(used)) / shape.experts
    if share >= 1 or length == 1:
        return math.inf
    independent = math.log(1 - share) / math.log(1 - shape.top_k / shape.experts)
    return (length - 1) / (length / independent - 1) if independent < length else math.inf
