"""Cache policies on a recorded routing trace: hit rates beside the optimum, and the cost of a decision.

    python -m benchmarks.policies TRACE [--test 14] [--splits 3] [--shares 0.05,0.1] [--tokens N] [--only cost]
        [-o results.jsonl]

TRACE is a trace of `expertpager ... --trace`, or an .npz with `experts` [tokens, layers, k], `tokens` [tokens] and
`starts` [prompts + 1]. Prompts are split: what can be learned is learned from the others, the hit rates are those of
the `--test` prompts, one after another through one cold cache. A row per policy and size goes to stdout, as JSON, for
every split, and one with mean and spread over the splits.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from offload.cache.decisions import Decision
from offload.cache.policy import CachePolicy, CacheShape, create_policy
from offload.cache.residency import Residency
from offload.cache.simulator import replay
from offload.cache.trace import Trace

GLOBAL = ("lru", "lfu", "ema", "ema+tokens", "belady")


def load_prompts(path: Path) -> tuple[CacheShape, list[tuple[np.ndarray, np.ndarray]]]:
    """Shape and, per prompt, token ids [T] and experts [T, L, K]."""
    with np.load(path) as file:
        plain = "starts" in file.files
        if plain:
            tokens, experts, starts = file["tokens"], file["experts"], file["starts"]
            shape = CacheShape(experts.shape[1], int(experts.max()) + 1, experts.shape[2])
    if not plain:
        trace = Trace.load(path)
        tokens, experts, shape = trace.tokens, trace.experts, trace.shape
        first = np.concatenate([[0], np.cumsum(trace.steps)])
        starts = np.concatenate([first[trace.sessions], [len(tokens)]])
    return shape, [
        (tokens[a:b], experts[a:b]) for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True) if b > a
    ]


def as_trace(shape: CacheShape, prompts: Sequence[tuple[np.ndarray, np.ndarray]], limit: int | None) -> Trace:
    """The prompts one after another, a token at a time."""
    tokens = np.concatenate([tokens for tokens, _ in prompts])[:limit]
    experts = np.concatenate([experts for _, experts in prompts])[:limit]
    return Trace(shape, tokens.astype(np.int32), np.ones(len(tokens), np.int32), experts.astype(np.uint16))


def learn(policy: CachePolicy, trace: Trace) -> None:
    """Show a policy the routing of other prompts."""
    for tokens, routing in trace.passes():
        policy.begin_step(tokens)
        for layer, ids in enumerate(routing):
            policy.observe(layer, ids)


class Lookahead(CachePolicy):
    """A policy that is told the next token's id, as a draft or a known text would."""

    def __init__(self, inner: CachePolicy, tokens: Sequence[int]) -> None:
        self.shape, self.values, self.inner = inner.shape, inner.values, inner
        self.name = f"{inner.name}, next id known"  # type: ignore[misc]
        self.floor_share = inner.floor_share  # type: ignore[misc]
        self._tokens, self._at = tokens, 0

    def begin_step(self, tokens: Sequence[int], upcoming: Sequence[int] = ()) -> bool:
        self._at += len(tokens)
        return self.inner.begin_step(tokens, self._tokens[self._at : self._at + 1])

    def observe(self, layer: int, ids: Any) -> None:
        self.inner.observe(layer, ids)
        self.revision = self.inner.revision


def hit_rates(shape: CacheShape, train: Trace, test: Trace, shares: Sequence[float]) -> Iterator[dict[str, Any]]:
    """A record per policy and size, with the part of the gap from per-layer LRU to Belady that is closed."""
    learned = create_policy("ema+tokens", shape)
    learn(learned, train)
    state = {name: array.copy() for name, array in learned.state().items()}
    upcoming = test.tokens.tolist()
    for share in shares:
        slots = round(share * shape.keys)
        per_layer = replay(test, "lru", slots, floor=slots // shape.layers)
        best = replay(test, "belady", slots, floor=0)
        yield record("lru per layer", share, per_layer, 0.0)
        runs: list[tuple[str, Any]] = [(name, name) for name in GLOBAL if name != "belady"]
        for told in (False, True):
            policy = create_policy("ema+tokens", shape)
            policy.restore(state)
            runs.append(("ema+tokens, learned", Lookahead(policy, upcoming) if told else policy))
        for name, policy in runs:
            result = replay(test, policy, slots)
            if isinstance(policy, Lookahead):
                name += ", next id known"
            gap = best.hit_rate - per_layer.hit_rate
            yield record(name, share, result, (result.hit_rate - per_layer.hit_rate) / gap if gap else 0.0)
        yield record("belady", share, best, 1.0)


def over_splits(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Mean, least and largest of every policy and size over the splits."""
    for policy, share in dict.fromkeys((row["policy"], row["share"]) for row in rows):
        same = [row for row in rows if (row["policy"], row["share"]) == (policy, share)]
        summary: dict[str, Any] = {"benchmark": "policies, all splits", "policy": policy, "share": share}
        summary["splits"] = len(same)
        for name in ("hit_rate", "gap_closed"):
            values = [row[name] for row in same]
            summary[name] = round(float(np.mean(values)), 4)
            summary[f"{name}_range"] = [min(values), max(values)]
        yield summary


def record(policy: str, share: float, result: Any, closed: float) -> dict[str, Any]:
    """One row."""
    return {
        "benchmark": "policies",
        "policy": policy,
        "share": share,
        "slots": result.slots,
        "tokens": result.tokens,
        "hit_rate": round(result.hit_rate, 4),
        "gap_closed": round(closed, 3),
    }


def decision_cost(policy: str, shape: CacheShape, share: float, runs: int = 5, steps: int = 60) -> dict[str, Any]:
    """Microseconds per layer and token, residency and policy together, on skewed random routing.

    Every run begins anew and gives the median over its layers; a processor that changes its clock makes them differ.
    """
    rng = np.random.default_rng(0)
    heat = rng.normal(0, 1.5, (shape.layers, shape.experts))
    routing = [
        [[np.argsort(-(row + rng.gumbel(size=shape.experts)))[: shape.top_k].tolist()] for row in heat]
        for _ in range(steps)
    ]
    medians, bests = [], []
    for _ in range(runs):
        residency = Residency(create_policy(policy, shape), round(share * shape.keys), floor=shape.top_k)
        layer_us, step_us = decisions(residency, routing)
        layer_us, step_us = layer_us[steps // 3 * shape.layers :], step_us[steps // 3 :]
        medians.append(float(np.median(layer_us) + np.median(step_us)))
        bests.append(float(np.percentile(layer_us, 10) + np.percentile(step_us, 10)))
    events = residency.events
    return {
        "benchmark": "decision cost",
        "policy": policy,
        "layers": shape.layers,
        "experts": shape.experts,
        "top_k": shape.top_k,
        "share": share,
        "hit_rate": round(events.hits / (events.hits + events.misses), 3),
        "us_per_layer_median": round(float(np.median(medians)), 1),
        "us_per_layer_by_run": [round(median, 1) for median in sorted(medians)],
        "us_per_layer_p10": round(float(np.median(bests)), 1),
    }


def decisions(residency: Residency, routing: Sequence[Sequence[Any]]) -> tuple[list[float], list[float]]:
    """Microseconds of every layer, and of every step's beginning divided by its layers."""

    def arrive(decision: Decision) -> None:
        for load in decision.loads:
            residency.loaded(load.slot)

    layer_us, step_us = [], []
    for step, layers in enumerate(routing):
        begin = time.perf_counter()
        residency.begin_step([step % 16])
        step_us.append(1e6 * (time.perf_counter() - begin) / len(layers))
        for layer, ids in enumerate(layers):
            begin = time.perf_counter()
            residency.serve(layer, ids, lambda _: None, arrive)
            layer_us.append(1e6 * (time.perf_counter() - begin))
    return layer_us, step_us


def facts() -> dict[str, Any]:
    """What a row needs to be compared with another."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "command": "python -m benchmarks.policies " + " ".join(Path(a).name for a in sys.argv[1:]),
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()} {platform.python_version()} numpy {np.__version__}",
    }


def main() -> None:
    """Print rows, and append them to a file if one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--test", type=int, default=14, help="prompts that are kept from learning")
    parser.add_argument("--splits", type=int, default=3, help="so many choices of those prompts")
    parser.add_argument("--shares", default="0.05,0.1,0.2,0.3")
    parser.add_argument("--tokens", type=int, help="only so many tokens of the test prompts")
    parser.add_argument("--only", choices=["hits", "cost"], help="hit rates, or what a decision costs")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    shape, prompts = load_prompts(arguments.trace)
    common = facts() | {"trace": arguments.trace.name, "test_prompts": arguments.test}

    def rows() -> Iterator[dict[str, Any]]:
        shares = [float(share) for share in arguments.shares.split(",")]
        done = []
        for seed in range(0 if arguments.only == "cost" else arguments.splits):
            order = np.random.default_rng(seed).permutation(len(prompts)).tolist()
            train = as_trace(shape, [prompts[i] for i in order[arguments.test :]], None)
            test = as_trace(shape, [prompts[i] for i in order[: arguments.test]], arguments.tokens)
            for row in hit_rates(shape, train, test, shares):
                done.append(row)
                yield row | {"seed": seed}
        if done and arguments.splits > 1:
            yield from over_splits(done)
        if arguments.only != "hits":
            for policy in ("lru", "ema", "ema+tokens"):
                yield decision_cost(policy, CacheShape(layers=58, experts=256, top_k=8), 0.3)

    for row in rows():
        line = json.dumps(row | common)
        print(line, flush=True)
        if arguments.output:
            with arguments.output.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
