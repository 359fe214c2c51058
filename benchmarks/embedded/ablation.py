"""Balancing compared: the loss-free bias, an auxiliary loss, and nothing, from the same seeds for the same steps.

    python -m benchmarks.embedded.ablation RUNS [--seeds 0 1] [--steps 500] [--record]

Trains a small model per way and seed into a folder of RUNS (about two minutes of one core each; a finished one is
taken as it is), prints a row for each, and with --record appends all of them with their curves to
benchmarks/results/balancing.jsonl.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.embedded.train import Recipe, train
from benchmarks.record import append

WAYS = ("bias", "aux", "none")
LAST = 100
"""Steps at the end over which MaxVio of the training batches is averaged."""


def finished(run: Path) -> list[dict[str, Any]]:
    """The curve of a run that was completed, else nothing."""
    path = run / "curve.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return rows if rows and "held_out_loss" in rows[-1] else []


def summary(rows: list[dict[str, Any]], recipe: dict[str, Any]) -> dict[str, Any]:
    """What is compared, and the curve of loss and MaxVio."""
    steps = [row for row in rows if "loss" in row and "step" in row]
    last = [row["max_vio_batch"] for row in steps if row["step"] > recipe["steps"] - LAST]
    end = rows[-1]
    return {
        "balance": recipe["balance"],
        "seed": recipe["seed"],
        "recipe": {
            name: value for name, value in recipe.items() if name not in ("balance", "seed", "start", "minutes")
        },
        "held_out_loss": end["held_out_loss"],
        "bits_per_byte": end["bits_per_byte"],
        "max_vio_held_out": end["max_vio_global"],
        "max_vio_held_out_layers": end["max_vio_global_layers"],
        "max_vio_batch": round(sum(last) / len(last), 3),
        "curve": {name: [row[name] for row in steps] for name in ("step", "loss", "max_vio_batch")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    corpus = None
    for seed in arguments.seeds:
        for way in WAYS:
            run = arguments.runs / f"{way}-{seed}"
            if not finished(run):
                if corpus is not None:  # tokenizer and tokens are the same for all
                    shutil.copytree(corpus, run, dirs_exist_ok=True)
                recipe = Recipe("ablation", way, arguments.steps, tokens=128, bigram_steps=40, seed=seed)
                train(recipe, run)
            corpus = run
            numbers = summary(finished(run), torch.load(run / "checkpoint.pt", weights_only=True)["recipe"])
            print(
                json.dumps({name: value for name, value in numbers.items() if name not in ("curve", "recipe")}),
                flush=True,
            )
            if arguments.record:
                append("balancing", "python -m benchmarks.embedded.ablation " + " ".join(sys.argv[1:]), numbers)


if __name__ == "__main__":
    main()
