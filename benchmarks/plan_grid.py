"""Predicted beside measured speed over a grid of stores, RAM budgets and cache policies.

    python benchmarks/plan_grid.py --folder SCRATCH [--shares 0.3 0.6 1.0] [--cells 8]
    python benchmarks/plan_grid.py --store STORE --shares 0.5 1.0 --cold 1

SCRATCH takes the 10B checkpoint of bench_model.py and its stores; with --store the grid is over that store alone, for
instance the embedded model's (`expertpager demo --keep FOLDER`). For every store the routing of other prompts than the
benchmark's is recorded, as a user would before asking `plan`. For every cell `expertpager bench` runs once, and between
its runs passes of `expertpager probe` in a process of their own: before each cold run, before every RUNS warm ones, and
at the end (A B A B A). A machine that others use, too, may change its pace by half within seconds; what a run meets has
to be what the passes met, so there are many of both, and they are near each other. The forecasts are those of the mean
of the passes around the runs, as in a probe, and of the trace; the speeds are the same means of the runs. A row per
cell holds both for warm decoding and for a cold prompt, their ratios, and those of every turn to the passes right
before and after it; the last row, the spread.
Four minutes a cell on two cores, half of one for settle.py, besides a recording for every store.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "benchmarks")]

import bench_model  # noqa: E402
from record import append  # noqa: E402
from settle import settle  # noqa: E402

from offload.engine.bench import BenchReport, Sample, bench, mean_demand, predictions  # noqa: E402
from offload.engine.beside_plan import model_cost  # noqa: E402
from offload.engine.engine import ram_for_share  # noqa: E402
from offload.engine.options import NO_PROFILE  # noqa: E402
from offload.engine.probing import sampling  # noqa: E402
from offload.store import Store  # noqa: E402
from offload.tune.compare import Comparison  # noqa: E402
from offload.tune.machine import MachineSpec, mean, typical  # noqa: E402
from offload.tune.planner import hit_curve  # noqa: E402
from offload.tune.probe import Effort, effort_for, probe  # noqa: E402

RUNS = 3
"""Warm runs behind a pass of probe: they take half as long."""

FORMATS, RESIDENT_FORMATS = ("int4-g32", "int8-g128", "bf16"), ("int8-g128",)

TARGET = 0.15
"""Gap between predicted and measured speed that is aimed at."""

OTHER_PROMPTS = (
    "The lighthouse keeper counted the waves, as he had every evening since",
    "for row in table:\n    print(row.name, row.total)\n\nclass Account:",
    "Photosynthesis turns light into sugar in two stages, of which the first",
    "Dear Sir or Madam, I am writing to complain about the delivery of",
)
"""What the trace behind the predictions is recorded with; `bench` has other prompts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--folder", type=Path)
    place.add_argument("--store", type=Path)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.3, 0.6, 1.0])
    parser.add_argument("--policies", nargs="+", default=["ema+tokens", "lru"])
    parser.add_argument("--experts", nargs="+", default=["int4-g32", "int8-g128"])
    parser.add_argument("--cells", type=int, help="Only so many cells, spread over the grid.")
    parser.add_argument("--cold", type=int, default=4, help="Cold runs of every cell, each behind a pass of probe.")
    parser.add_argument("--turns", type=int, default=8, help=f"Passes with {RUNS} warm runs behind each.")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=20)
    parser.add_argument("--context", type=int, default=512)
    arguments = parser.parse_args()
    stores = [arguments.store]
    if arguments.folder:
        stores = [bench_model.store(arguments.folder, codec) for codec in arguments.experts]
    cells = chosen([(s, share, p) for s in stores for share in arguments.shares for p in arguments.policies], arguments)
    rows = []
    with tempfile.TemporaryDirectory(prefix="expertpager-grid-") as folder:
        used = dict.fromkeys(store for store, *_ in cells)
        traces = {store: recorded(store, Path(folder) / f"{store.name}.npz", arguments) for store in used}
        for store, share, policy in cells:
            rows.append(cell(store, policy, measured(store, share, policy, arguments), traces[store], arguments))
            append("plan_grid", f"python benchmarks/plan_grid.py {options(arguments)}", rows[-1])
            print(json.dumps(rows[-1]), flush=True)
    numbers = spread(rows)
    append("plan_grid", f"python benchmarks/plan_grid.py {options(arguments)}", numbers)
    print(json.dumps(numbers, indent=1))


Cell = tuple[Path, float, str]


def chosen(cells: list[Cell], arguments: argparse.Namespace) -> list[Cell]:
    """All cells, or as many as asked for, at even distances; with all experts resident policies are alike."""
    alike = [cell for cell in cells if cell[1] < 1 or cell[2] == arguments.policies[0]]
    count = min(arguments.cells or len(alike), len(alike))
    return [alike[round(number * (len(alike) - 1) / max(1, count - 1))] for number in range(count)]


def recorded(store: Path, trace: Path, arguments: argparse.Namespace) -> Path:
    """The routing of other prompts, recorded as a run of `bench`."""
    with _process() as apart:
        apart.submit(record, store, trace, arguments.context).result()
    settle()
    return trace


def record(store: Path, trace: Path, context: int) -> None:
    """The same, in this process."""
    prompts = trace.with_suffix(".txt")
    write_prompts(prompts)
    sizes = {"warm": 3, "prompt_tokens": 16, "max_tokens": 48, "context": context}
    ram = str(ram_for_share(store, 0.6, context))
    bench(store, **sizes, prompts=prompts, trace=str(trace), ram=ram, profile=NO_PROFILE)


def write_prompts(file: Path) -> None:
    """OTHER_PROMPTS, one in a line."""
    file.write_text("\n".join(json.dumps(text)[1:-1] for text in OTHER_PROMPTS), encoding="utf-8")


@dataclass(frozen=True)
class Turns:
    """A run of `bench` and what the machine was like meanwhile."""

    report: BenchReport
    ram: int
    passes: Sequence[MachineSpec]
    before: Sequence[int]
    """The last pass before each run, cold ones first."""


def measured(store: Path, share: float, policy: str, arguments: argparse.Namespace) -> Turns:
    """What `bench` says of a store with slots for `share` of its experts, and `probe` between its runs.

    The whole store is read before: a virtual drive serves what was read lately several times as fast, and a run comes
    back to the same experts where the probe reads any of them.
    """
    program("verify", str(store))
    with _process() as apart:  # so that no memory of it stays here
        found = apart.submit(in_turns, store, share, policy, arguments).result()
    settle()  # its slots are gigabytes
    return found


def in_turns(store: Path, share: float, policy: str, arguments: argparse.Namespace) -> Turns:
    """The same, in this process."""
    ram = ram_for_share(store, share, arguments.context)
    passes: list[MachineSpec] = []
    before: list[int] = []
    with tempfile.TemporaryDirectory(prefix="expertpager-grid-") as folder, _process() as apart:

        def turn() -> None:
            passes.append(apart.submit(one_pass, store, Path(folder) / "machine.toml").result())

        def tell(run: str) -> None:
            """Called before each run, whose name it is given."""
            kind, number = run.split(" run ")
            if kind == "cold" or (int(number) - 1) % RUNS == 0:
                turn()
            before.append(len(passes) - 1)

        sizes = {"prompt_tokens": arguments.prompt_tokens, "max_tokens": arguments.max_tokens}
        runs = {"cold": arguments.cold, "warm": arguments.turns * RUNS}
        options = {"context": arguments.context, "ram": str(ram), "policy": policy}
        report = bench(store, **runs, **sizes, profile=NO_PROFILE, tell=tell, **options)
        turn()
    return Turns(report, ram, passes, before)


def one_pass(store: Path, file: Path) -> MachineSpec:
    """What one of the passes of a whole probe says of the machine now, of the formats that the grid's stores have."""
    one = {"passes": 1, "seconds": Effort.seconds / Effort.passes}
    effort = replace(effort_for(Store.open(store)), formats=FORMATS, resident_formats=RESIDENT_FORMATS, **one)
    return probe(file, location=store, effort=effort, sampling=sampling).machine


def _process() -> ProcessPoolExecutor:
    """A process of its own for what is called with it."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def cell(store: Path, policy: str, turns: Turns, trace: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs beside their prediction from the passes before, between and after them."""
    opened, report = Store.open(store), turns.report
    model, curve = model_cost(opened), hit_curve(str(trace), opened.config, policy)
    expected = curve.demand(report.share)
    kinds = {"cold": turns.before[: len(report.cold)], "warm": turns.before[len(report.cold) :]}

    def compared(kind: str, runs: Sequence[Sample], before: Sequence[int]) -> Comparison:
        """Some runs beside what the passes around them let expect."""
        machine = mean(turns.passes[before[0] : before[-1] + 2]).under(policy)
        cold, warm = (runs, report.warm) if kind == "cold" else (report.cold, runs)
        found = predictions(model, machine, cold, warm, expected, report.chunk, curve.alike, typical)
        return found[1] if kind == "cold" else found[0]

    row: dict[str, Any] = {"store": store.name, "share": round(report.share, 3), "policy": policy, "ram": turns.ram}
    for name, kind, tokens in (("decode", "warm", 1), ("prefill", "cold", arguments.prompt_tokens)):
        runs: Sequence[Sample] = getattr(report, kind)
        item = compared(kind, runs, kinds[kind])
        behind: dict[int, list[Sample]] = {}
        for number, run in zip(kinds[kind], runs, strict=True):
            behind.setdefault(number, []).append(run)
        each = [compared(kind, some, [number]) for number, some in behind.items()]
        row |= {
            f"{name} predicted tok/s": round(tokens / item.predicted_s, 3),
            f"{name} measured tok/s": round(tokens / item.measured_s, 3),
            f"{name} predicted / measured": round(item.measured_s / item.predicted_s, 3),
            f"{name} gap by": {part: round(seconds, 4) for part, seconds in item.causes.items()},
            f"{name} measured tok/s, turns": [round(tokens / one.measured_s, 3) for one in each],
            f"{name} predicted / measured, turns": [round(one.measured_s / one.predicted_s, 3) for one in each],
        }
    actual = mean_demand([item.decode.demand(expected.prefetch_depth) for item in report.warm])
    row["hit rate measured"] = round(actual.hit + actual.ahead, 4)
    row["hit rate predicted"] = round(expected.hit + expected.ahead, 4)
    row["read ahead measured"] = round(actual.ahead, 4)
    row["read ahead predicted"] = round(expected.ahead, 4)
    stalls = [item.decode.stall_s / item.decode.tokens for item in report.warm]
    row["decode stall measured s"] = round(statistics.median(stalls), 4)
    row["prefill stall measured s"] = round(statistics.median(item.prefill.stall_s for item in report.cold), 4)
    return row


def spread(rows: Sequence[dict[str, Any]], what: str = "cells") -> dict[str, Any]:
    """Of the ratios of all rows, whose number is that of `what`: median, least, largest, how many are within the
    target."""
    numbers: dict[str, Any] = {what: len(rows)}
    for name in ("decode", "prefill"):
        ratios = [row[f"{name} predicted / measured"] for row in rows]
        numbers |= {
            f"{name} median": round(statistics.median(ratios), 3),
            f"{name} range": [min(ratios), max(ratios)],
            f"{name} within {TARGET:.0%}": f"{sum(abs(ratio - 1) <= TARGET for ratio in ratios)} of {len(ratios)}",
        }
    return numbers


def options(arguments: argparse.Namespace) -> str:
    """The command's options without paths of this machine."""

    def texts() -> Iterator[str]:
        yield "--store STORE" if arguments.store else "--folder SCRATCH"
        for name in ("shares", "policies", "experts"):
            yield f"--{name} " + " ".join(map(str, getattr(arguments, name)))
        if arguments.cells:
            yield f"--cells {arguments.cells}"
        yield f"--cold {arguments.cold} --turns {arguments.turns}"
        yield f"--prompt-tokens {arguments.prompt_tokens} --max-tokens {arguments.max_tokens}"

    return " ".join(texts())


def program(*command: str) -> list[str]:
    """Standard output of `expertpager COMMAND`, by lines."""
    print("expertpager", *command, file=sys.stderr)
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"expertpager {command[0]} failed with exit code {done.returncode}")
    return done.stdout.splitlines()


if __name__ == "__main__":
    main()
