"""Predicted beside measured speed over a grid of stores, RAM budgets and cache policies.

    python benchmarks/plan_grid.py --folder SCRATCH [--shares 0.3 0.45 0.6 1.0] [--cells 8]
    python benchmarks/plan_grid.py --store STORE --shares 0.5 1.0

SCRATCH takes the 10B checkpoint of bench_model.py and its stores; with --store the grid is over that store alone, for
instance the embedded model's (`expertpager demo --keep FOLDER`). For every store the routing of other prompts than the
benchmark's is recorded, as a user would before asking `plan`. For every cell passes of `expertpager probe` and runs of
`expertpager bench`, each in a process of its own, take turns (A B A B A): a machine that others use, too, does not stay
the same for long, and what a run meets has to be what the probes met. The forecast is that of the mean of all passes,
as in a probe, and of the trace; the speeds are the same mean of all runs: on a machine that has two paces a median
tells the one that lasted longer. A row per cell holds both for warm decoding and for a cold prompt, their ratios, and
those of every run to the passes right before and after it; the last row, the spread.
A minute and a half for every run and its pass on two cores, half a minute of which settle.py may wait, besides a
recording for every store.
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
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "benchmarks")]

import bench_model  # noqa: E402
from record import append  # noqa: E402
from settle import settle  # noqa: E402

from offload.engine.bench import Sample, mean_demand, predictions  # noqa: E402
from offload.engine.beside_plan import model_cost  # noqa: E402
from offload.engine.engine import ram_for_share  # noqa: E402
from offload.engine.probing import sampling  # noqa: E402
from offload.engine.summary import Phase  # noqa: E402
from offload.store import Store  # noqa: E402
from offload.tune.compare import Comparison  # noqa: E402
from offload.tune.machine import MachineSpec, mean, typical  # noqa: E402
from offload.tune.planner import hit_curve  # noqa: E402
from offload.tune.probe import Effort, effort_for, probe  # noqa: E402

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
    parser.add_argument("--shares", type=float, nargs="+", default=[0.3, 0.45, 0.6, 1.0])
    parser.add_argument("--policies", nargs="+", default=["ema+tokens", "lru"])
    parser.add_argument("--experts", nargs="+", default=["int4-g32", "int8-g128"])
    parser.add_argument("--cells", type=int, help="Only so many cells, spread over the grid.")
    parser.add_argument("--rounds", type=int, default=4, help="Runs of every cell, each between two passes of probe.")
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
            reports, probes = [], [probed(store, Path(folder))]
            for _ in range(arguments.rounds):
                reports.append(measured(store, share, policy, arguments))
                probes.append(probed(store, Path(folder)))
            rows.append(cell(store, policy, reports, probes, traces[store], arguments))
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
    prompts = trace.with_suffix(".txt")
    write_prompts(prompts)
    ram = ram_for_share(store, 0.6, arguments.context)
    sizes = ["--warm", "3", "--prompt-tokens", "16", "-n", "48", "--context", str(arguments.context), "--ram", str(ram)]
    bench(store, "--prompts", str(prompts), "--trace", str(trace), *sizes)
    return trace


def write_prompts(file: Path) -> None:
    """OTHER_PROMPTS, one in a line."""
    file.write_text("\n".join(json.dumps(text)[1:-1] for text in OTHER_PROMPTS), encoding="utf-8")


def probed(store: Path, folder: Path) -> MachineSpec:
    """What a pass of `probe` says of the machine now, of the formats that the grid's stores have.

    The whole store is read before: a virtual drive serves what was read lately several times as fast, and a run comes
    back to the same experts where the probe reads any of them.
    """
    program("verify", str(store))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:  # so that no memory of it stays here
        return apart.submit(probe_alone, store, folder / "machine.toml").result()


def probe_alone(store: Path, file: Path) -> MachineSpec:
    """One of the passes of a whole probe."""
    one = {"passes": 1, "seconds": Effort.seconds / Effort.passes}
    effort = replace(effort_for(Store.open(store)), formats=FORMATS, resident_formats=RESIDENT_FORMATS, **one)
    return probe(file, location=store, effort=effort, sampling=sampling).machine


def measured(store: Path, share: float, policy: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What `bench` says of a store with slots for `share` of its experts."""
    ram = ram_for_share(store, share, arguments.context)
    sizes = ["--prompt-tokens", str(arguments.prompt_tokens), "-n", str(arguments.max_tokens), "--warm", "2"]
    sizes += ["--context", str(arguments.context), "--ram", str(ram), "--policy", policy]
    program("verify", str(store))  # as before a probe
    report: dict[str, Any] = json.loads(bench(store, "--json", *sizes)[-1])
    return report | {"ram": ram}


def bench(store: Path, *options: str) -> list[str]:
    """Standard output of `expertpager bench`. Its slots are gigabytes: returns when they cost nobody anything."""
    lines = program("bench", str(store), "--profile", "none", *options)
    settle()
    return lines


def cell(
    store: Path,
    policy: str,
    reports: Sequence[dict[str, Any]],
    probes: Sequence[MachineSpec],
    trace: Path,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Runs beside their prediction from the passes before, between and after them."""
    opened = Store.open(store)
    model, curve = model_cost(opened), hit_curve(str(trace), opened.config, policy)
    first = reports[0]
    expected = curve.demand(first["share"])

    runs = [[[sample(item) for item in report[kind]] for kind in ("cold", "warm")] for report in reports]
    cold, warm = ([item for run in runs for item in run[kind]] for kind in (0, 1))

    def foretold(machines: Sequence[MachineSpec], cold: Sequence[Sample], warm: Sequence[Sample]) -> list[Comparison]:
        machine = mean(machines).under(policy)
        return predictions(model, machine, cold, warm, expected, first["chunk"], curve.alike, typical)

    row: dict[str, Any] = {"store": store.name, "share": round(first["share"], 3), "policy": policy}
    row["ram"] = first["ram"]
    rounds = [foretold(probes[n : n + 2], *run) for n, run in enumerate(runs)]
    for item, *each in zip(foretold(probes, cold, warm), *rounds, strict=True):
        name, tokens = ("decode", 1) if item.what.startswith("warm decode") else ("prefill", arguments.prompt_tokens)
        row |= {
            f"{name} predicted tok/s": round(tokens / item.predicted_s, 3),
            f"{name} measured tok/s": round(tokens / item.measured_s, 3),
            f"{name} predicted / measured": round(item.measured_s / item.predicted_s, 3),
            f"{name} gap by": {part: round(seconds, 4) for part, seconds in item.causes.items()},
            f"{name} measured tok/s, rounds": [round(tokens / one.measured_s, 3) for one in each],
            f"{name} predicted / measured, rounds": [round(one.measured_s / one.predicted_s, 3) for one in each],
        }
    actual = mean_demand([item.decode.demand(expected.prefetch_depth) for item in warm])
    row["hit rate measured"] = round(actual.hit + actual.ahead, 4)
    row["hit rate predicted"] = round(expected.hit + expected.ahead, 4)
    row["read ahead measured"] = round(actual.ahead, 4)
    row["read ahead predicted"] = round(expected.ahead, 4)
    row["decode stall measured s"] = round(statistics.median(i.decode.stall_s / i.decode.tokens for i in warm), 4)
    row["prefill stall measured s"] = round(statistics.median(item.prefill.stall_s for item in cold), 4)
    return row


def sample(values: dict[str, Any]) -> Sample:
    """A generation out of the JSON of `bench`."""
    return Sample(Phase(**values["prefill"]), Phase(**values["decode"]), values["layer_stall_s"])


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
        yield f"--rounds {arguments.rounds}"
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
