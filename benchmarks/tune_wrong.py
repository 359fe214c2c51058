"""`tune` on a deliberately wrong profile, beside an exhaustive sweep.

    python benchmarks/tune_wrong.py --folder SCRATCH [--share 0.6]
    python benchmarks/tune_wrong.py --store STORE --share 0.6

The wrong profile has fewer slots than one token uses, least-recently-used replacement, one thread and one reader.
RAM is taken to end at `--share` of the experts, as a smaller machine's would: `tune` may choose up to that budget.

The sweep runs every policy with and without reading ahead under the full budget, then the best of these with half the
threads, and with half and twice the readers. What it leaves out: fewer slots, which are a part of more; half-lives and
depths, which `tune` may find beyond it.

What a machine does changes within minutes, so the ratio is none of runs that lie apart: at the end what `tune` found
and the best of the sweep take turns. It should be 0.95 or more. About eight minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "benchmarks")]

import bench_model  # noqa: E402
from record import append  # noqa: E402

from offload.engine.bench import TOPICS  # noqa: E402
from offload.engine.engine import ram_for_share  # noqa: E402
from offload.engine.options import LIVE_POLICIES, RuntimeOptions  # noqa: E402
from offload.engine.tuning import Run, Trial, profile_values, runner, tune  # noqa: E402
from offload.kernels.native import usable_cpus  # noqa: E402

TURNS = 2
PROMPTS = (TOPICS[0], "The sea", "def sort(", "Salt and")
"""The first fills the slots and is not timed; the others are short, since only decoding is compared."""

PROCESS_GROWTH = 160 << 20
"""Room for what this process grows by, which runs many engines one after another."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--folder", type=Path)
    place.add_argument("--store", type=Path)
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--context", type=int, default=256)
    arguments = parser.parse_args()
    store = arguments.store or bench_model.store(arguments.folder)
    full = ram_for_share(store, arguments.share, arguments.context) + PROCESS_GROWTH
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="expertpager-tune-") as folder:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
        real = runner(store, prompts, arguments.max_tokens)

        def run(options: RuntimeOptions, record: bool) -> Trial:
            """A machine whose free RAM ends at `full`."""
            trial = real(replace(options, ram=options.ram or full), record)
            print(f"{trial.tok_s:.2f} tok/s, {profile_values(options)}", file=sys.stderr)
            return replace(trial, options=options)

        wrong = Path(folder) / "wrong.toml"
        least = ram_for_share(store, 0.05, arguments.context) + PROCESS_GROWTH
        rows = [f"ram = {least}", 'policy = "lru"', "threads = 1", "readers = 1", "allow_slow = true"]
        wrong.write_text("\n".join([*rows, f"context = {arguments.context}\n"]))
        report = tune(store, output=Path(folder) / "found.toml", profile=wrong, run=run)
        found = replace(report.after.options, ram=None, trace=None)
        swept = sweep(run, arguments.context)
        best = max(swept, key=lambda trial: trial.tok_s)
        pairs = in_turns(run, found, best.options)
    tuned, swept_best = (middle(side) for side in zip(*pairs, strict=True))
    numbers: dict[str, Any] = {
        "store": store.name,
        "share": arguments.share,
        "before tok/s": round(report.before.tok_s, 3),
        "tuned tok/s": round(report.after.tok_s, 3),
        "tuned again tok/s": round(tuned, 3),
        "best of sweep tok/s": round(swept_best, 3),
        "tuned / best": round(tuned / swept_best, 3),
        "in turns": [[round(trial.tok_s, 3) for trial in pair] for pair in pairs],
        "tuned options": profile_values(found),
        "best options": profile_values(best.options),
        "trials": len(report.steps) + 1,
        "sweep": [{"options": profile_values(t.options), "tok/s": round(t.tok_s, 3)} for t in swept],
        "seconds": round(time.perf_counter() - begun),
    }
    place_text = "--store STORE" if arguments.store else "--folder SCRATCH"
    sizes = f"--share {arguments.share} --max-tokens {arguments.max_tokens}"
    append("tune", f"python benchmarks/tune_wrong.py {place_text} {sizes}", numbers)
    print(json.dumps(numbers, indent=1))


def sweep(run: Run, context: int) -> list[Trial]:
    """Every combination of `combinations`, then the best one's `neighbours`."""
    trials = [run(options, False) for options in combinations(context)]
    best = max(trials, key=lambda trial: trial.tok_s)
    return trials + [run(options, False) for options in neighbours(best.options)]


def combinations(context: int) -> list[RuntimeOptions]:
    """Every policy, with and without reading ahead."""
    grid = itertools.product(LIVE_POLICIES, (True, False))
    return [RuntimeOptions(context=context, policy=policy, prefetch=prefetch) for policy, prefetch in grid]


def neighbours(best: RuntimeOptions) -> list[RuntimeOptions]:
    """Half the threads; half and twice the readers."""
    cores = usable_cpus()
    fewer = [replace(best, threads=cores // 2)] if cores > 1 else []
    return [*fewer, *(replace(best, readers=count) for count in (best.readers // 2, best.readers * 2))]


def in_turns(run: Run, one: RuntimeOptions, other: RuntimeOptions) -> list[tuple[Trial, Trial]]:
    """Trials of both settings, one after the other, TURNS times."""
    return [(run(one, False), run(other, False)) for _ in range(TURNS)]


def middle(trials: Sequence[Trial]) -> float:
    """Tokens per second by the median over all prompts of all trials."""
    return 1 / statistics.median(seconds for trial in trials for seconds in trial.seconds)


if __name__ == "__main__":
    main()
