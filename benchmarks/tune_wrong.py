"""`tune` on a deliberately wrong profile, beside an exhaustive sweep.

    python benchmarks/tune_wrong.py --folder SCRATCH [--share 0.45]
    python benchmarks/tune_wrong.py --store STORE --share 0.45

The wrong profile has fewer slots than one token uses, least-recently-used replacement, one thread and one reader.
RAM is taken to end at `--share` of the experts, as a smaller machine's would: `tune` may choose up to that budget. The
sweep then runs every combination of policy, threads, readers and reading ahead under the full budget with the same
prompts. The row holds what both found and the ratio, which should be 0.95 or more. Some minutes on two cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "benchmarks")]

import bench_model  # noqa: E402
from record import append  # noqa: E402

from offload.engine.engine import ram_for_share  # noqa: E402
from offload.engine.options import RuntimeOptions  # noqa: E402
from offload.engine.tuning import Trial, profile_values, runner, tune  # noqa: E402
from offload.kernels.native import usable_cpus  # noqa: E402

PROCESS_GROWTH = 160 << 20
"""Room for what this process grows by, which runs many engines one after another."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--folder", type=Path)
    place.add_argument("--store", type=Path)
    parser.add_argument("--share", type=float, default=0.45)
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--context", type=int, default=256)
    arguments = parser.parse_args()
    store = arguments.store or bench_model.store(arguments.folder)
    full = ram_for_share(store, arguments.share, arguments.context) + PROCESS_GROWTH
    real = runner(store, None, arguments.max_tokens)

    def run(options: RuntimeOptions, record: bool) -> Trial:
        """A machine whose free RAM ends at `full`."""
        trial = real(replace(options, ram=options.ram or full), record)
        print(f"{trial.tok_s:.2f} tok/s, {profile_values(options)}", file=sys.stderr)
        return replace(trial, options=options)

    with tempfile.TemporaryDirectory(prefix="expertpager-tune-") as folder:
        wrong = Path(folder) / "wrong.toml"
        least = ram_for_share(store, 0.05, arguments.context) + PROCESS_GROWTH
        rows = [f"ram = {least}", 'policy = "lru"', "threads = 1", "readers = 1", "allow_slow = true"]
        wrong.write_text("\n".join([*rows, f"context = {arguments.context}\n"]))
        report = tune(store, output=Path(folder) / "found.toml", profile=wrong, run=run)
    found = replace(report.after.options, ram=None, trace=None)
    sweep = {options: run(options, False) for options in combinations(arguments.context)}
    again = run(found, False)  # beside the sweep, not before it: the machine may have changed meanwhile
    best = max(sweep.values(), key=lambda trial: trial.tok_s)
    numbers: dict[str, Any] = {
        "store": store.name,
        "share": arguments.share,
        "before tok/s": round(report.before.tok_s, 3),
        "tuned tok/s": round(report.after.tok_s, 3),
        "tuned again tok/s": round(again.tok_s, 3),
        "best of sweep tok/s": round(best.tok_s, 3),
        "tuned / best": round(again.tok_s / best.tok_s, 3),
        "tuned options": profile_values(found),
        "best options": profile_values(best.options),
        "trials": len(report.steps) + 1,
        "sweep": [{"options": profile_values(o), "tok/s": round(t.tok_s, 3)} for o, t in sweep.items()],
    }
    place_text = "--store STORE" if arguments.store else "--folder SCRATCH"
    sizes = f"--share {arguments.share} --max-tokens {arguments.max_tokens}"
    append("tune", f"python benchmarks/tune_wrong.py {place_text} {sizes}", numbers)
    print(json.dumps(numbers, indent=1))


def combinations(context: int) -> list[RuntimeOptions]:
    """Every combination that the sweep tries."""
    cores = usable_cpus()
    grid = itertools.product(("ema+tokens", "lru"), sorted({cores, max(1, cores // 2)}), (4, 8), (True, False))
    return [
        RuntimeOptions(context=context, policy=policy, threads=threads, readers=readers, prefetch=prefetch)
        for policy, threads, readers, prefetch in grid
    ]


if __name__ == "__main__":
    main()
