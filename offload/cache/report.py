"""What a trace says about cache sizes: hits, bytes and waiting for a grid of policies, beside the optimum.

Owns the choice of the grid and the table. The replay itself is `simulator`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.cache.policy import HALF_LIVES, POLICIES, check_half_life
from offload.cache.simulator import Machine, Result, sweep
from offload.cache.trace import Trace
from offload.errors import UsageError
from offload.report import Curve, Page, line_chart
from offload.types import format_size

SHARES = (0.05, 0.1, 0.2, 0.3, 0.5)
"""Cache sizes of the grid, as shares of all experts, where none are given."""


@dataclass(frozen=True)
class Simulation:
    """Results of one trace. `recorded` are the events of the live run, if it is a live trace."""

    trace: Trace
    results: Sequence[Result]

    def lines(self) -> Iterator[str]:
        """A table: one row per policy and size."""
        shape = self.trace.shape
        yield (
            f"{len(self.trace.tokens)} tokens, {shape.layers} layers x {shape.experts} experts, "
            f"{shape.top_k} per token, {format_size(self.results[0].settings['expert_bytes'])} each"
        )
        yield f"{'policy':<12} {'slots':>7} {'share':>6} {'hits':>7} {'read/token':>11} {'waiting/token':>14}"
        for r in self.results:
            yield (
                f"{r.policy:<12} {r.slots:>7} {r.slots / shape.keys:>6.1%} {r.hit_rate:>7.1%} "
                f"{format_size(r.bytes_read / r.tokens):>11} {1000 * r.stall_s / r.tokens:>11.2f} ms"
            )

    def page(self) -> Page:
        """Hits, bytes and waiting over the cache size, as charts and as a table."""
        shape = self.trace.shape
        page = Page("Expert cache: policies and sizes", "One recorded routing, replayed for every policy and size.")
        page.fact("Tokens", f"{len(self.trace.tokens):,}")
        page.fact("Experts", f"{shape.layers} layers x {shape.experts}, {shape.top_k} per token")
        charts: tuple[tuple[str, str, Callable[[Result], float], bool], ...] = (
            ("Hit rate", "demands served without a read", lambda r: r.hit_rate, True),
            ("Bytes read", "MB per token", lambda r: r.bytes_read / r.tokens / 1e6, False),
            ("Waiting", "ms per token", lambda r: 1000 * r.stall_s / r.tokens, False),
        )
        for title, label, value, percent in charts:
            curves = [
                Curve(
                    policy,
                    [100 * r.slots / shape.keys for r in self.results if r.policy == policy],
                    [value(r) for r in self.results if r.policy == policy],
                    reference=policy == "belady",
                )
                for policy in dict.fromkeys(r.policy for r in self.results)
            ]
            chart = line_chart(curves, x_label="slots, % of all experts", y_label=label, percent=percent)
            page.section(title).chart(chart)
        page.section("All results").table(
            ["policy", "slots", "hits", "misses", "evictions", "hit rate", "bytes read", "waiting, s"],
            [
                [
                    r.policy,
                    r.slots,
                    r.events.hits,
                    r.events.misses,
                    r.events.evictions,
                    f"{r.hit_rate:.1%}",
                    format_size(r.bytes_read),
                    f"{r.stall_s:.3f}",
                ]
                for r in self.results
            ],
        )
        return page

    def to_dict(self) -> dict[str, Any]:
        """All results for machines."""
        return {"tokens": len(self.trace.tokens), "results": [result.as_dict() for result in self.results]}


def simulate(
    trace: str | Path,
    policies: Sequence[str] = (),
    sizes: Sequence[int] = (),
    drive: int = 3 * 10**9,
    memory: int = 30 * 10**9,
    half_life: float | None = None,
) -> Simulation:
    """Replay the recorded routing in the file `trace` for every policy and number of slots.

    `drive` and `memory` are bytes per second. `half_life` is that of the policies that have one, in tokens; None: the
    recording's for its policy, their own for others. Raises UsageError for an unknown policy, for a half-life that
    none of `policies` can use, or a bad trace.
    """
    for policy in policies:
        if policy not in POLICIES:
            raise UsageError(f"unknown policy {policy!r}; known: {', '.join(POLICIES)}")
    chosen = list(dict.fromkeys(policies)) or list(POLICIES)
    aging = [policy for policy in chosen if policy in HALF_LIVES]
    if half_life is not None:
        check_half_life(half_life, aging[0] if aging else chosen[0])
    loaded = Trace.load(trace)
    if not len(loaded.tokens):
        raise UsageError(f"{trace}: the trace holds no tokens")
    expert_bytes = loaded.header.get("expert_bytes") or 1
    machine = Machine(expert_bytes, float(drive), memory_bytes_per_s=float(memory))
    keys = loaded.shape.keys
    if sizes and not 1 <= min(sizes) <= max(sizes) <= keys:
        wrong = next(size for size in sizes if not 1 <= size <= keys)
        raise UsageError(f"--slots {wrong}: it must be 1 to {keys}, which hold all experts of {trace}")
    sizes = list(dict.fromkeys(sizes)) or sorted({max(1, round(share * keys)) for share in SHARES})
    results = []
    for policy in chosen:
        options = {} if half_life is None or policy not in aging else {"half_life": half_life}
        results += sweep(loaded, [policy], list(sizes), machine=machine, **options)
    for result in results:
        result.settings["expert_bytes"] = expert_bytes
    return Simulation(loaded, results)
