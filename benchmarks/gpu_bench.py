"""What `expertpager bench` measures on a GPU beside what `expertpager probe` lets expect, over budgets.

    python benchmarks/gpu_bench.py --folder SCRATCH [--vram 6500MB 8GB 16GB] [--ram 24GB 5GB] [--max-tokens 256]

SCRATCH takes one dense and three MoE layers of 64 experts in DeepSeek-V3's shapes (bench_model.py; 14 GB with their
checkpoint). The machine is probed, the routing of other prompts is recorded, as a user would before asking `plan`, and
`bench` compares each of its runs with that. A row for every budget of VRAM with the first budget of RAM; for the first
budget of VRAM, one for each further budget of RAM and one with `--split hybrid`; then the spread of all.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "benchmarks")]

import bench_model  # noqa: E402
import torch  # noqa: E402
from plan_grid import program, spread, write_prompts  # noqa: E402
from record import append  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--vram", nargs="+", default=["6500MB", "8GB", "16GB"])
    parser.add_argument("--ram", nargs="+", default=["24GB", "5GB"])
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--keep", type=Path, help="folder for the machine file and the reports of bench")
    arguments = parser.parse_args()
    store = bench_model.store(arguments.folder, shape="v3")
    rows = []
    with tempfile.TemporaryDirectory(prefix="expertpager-gpu-bench-") as temporary:
        folder = arguments.keep or Path(temporary)
        machine, trace, prompts = (folder / name for name in ("machine.toml", "routing.npz", "prompts.txt"))
        program("probe", str(store), "-o", str(machine))
        write_prompts(prompts)
        on_gpu = ["bench", str(store), "--device", "cuda", "--profile", "none"]
        program(*on_gpu, "--prompt-tokens", "32", "-n", "64", "--prompts", str(prompts), "--trace", str(trace))
        for number, setting in enumerate(settings(arguments.vram, arguments.ram)):
            options = ["--prompt-tokens", str(arguments.prompt_tokens), "-n", str(arguments.max_tokens), *setting]
            foretold = ["--machine", str(machine), "--hits", str(trace)]
            report = json.loads(program(*on_gpu, *options, *foretold, "--json")[-1])
            (folder / f"report-{number}.json").write_text(json.dumps(report), encoding="utf-8")
            rows.append(row(report))
            append("gpu_bench", " ".join(["python benchmarks/gpu_bench.py, bench with", *options]), rows[-1])
            print(json.dumps(rows[-1], indent=1), flush=True)
    numbers = spread(rows, "runs")
    append("gpu_bench", "python benchmarks/gpu_bench.py --folder SCRATCH", numbers)
    print(json.dumps(numbers, indent=1))


def settings(vram: list[str], ram: list[str]) -> list[list[str]]:
    """Options of the runs."""
    found = [["--vram", limit, "--ram", ram[0]] for limit in vram]
    found += [["--vram", vram[0], "--ram", limit] for limit in ram[1:]]
    return [*found, [*found[0], "--split", "hybrid"]]


def row(report: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a report of `bench`."""
    phases = [sample["decode"] for sample in report["warm"]]
    tokens = sum(phase["tokens"] for phase in phases)
    numbers: dict[str, Any] = {"device": torch.cuda.get_device_name(), "ram slots": report["slots"]}
    numbers |= {"vram": report["vram"], "hit rate expected": report["expected_hit_rate"]}
    numbers |= {name: round(value, 3) for name, value in report["medians"].items()}
    for what, compared in report["compared"].items():
        name = "decode" if "decode" in what else "prefill"
        numbers[f"{name} predicted / measured"] = round(compared["measured_s"] / compared["predicted_s"], 3)
        numbers[f"{name} seconds"] = {key: value for key, value in compared.items() if key.endswith("_s")}
    counted = {key: sum(phase["vram"][key] for phase in phases) / tokens for key in ("hits", "misses", "reads")}
    return numbers | {"vram per warm token": {key: round(value, 3) for key, value in counted.items()}}


if __name__ == "__main__":
    main()
