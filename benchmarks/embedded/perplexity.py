"""Perplexity of the embedded model on held-out text per domain and store, through the runtime.

    python -m benchmarks.embedded.corpus TEXTS
    python -m benchmarks.embedded.perplexity TEXTS [--checkpoint configs/demo] [--experts int4-g32 ...] [--record]

TEXTS holds a folder of held-out texts per domain. Prints one JSON row per store and, with --record, appends it to
benchmarks/results/embedded_perplexity.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import offload
from benchmarks.record import append
from convert import convert
from offload.engine.atlas import read_domains
from offload.engine.engine import Engine

STORES = {"bf16": "bf16", "fp8": "fp8", "int8-g64": None, "int4-g32": None, "nf4-b64": None}
"""Experts' codec -> codec of the resident weights; None: the converter's default. A row of an expert here has 64
columns, so that int8 has groups of 64."""


def windows(engine: Engine, path: Path, tokens: int) -> Iterator[list[int]]:
    """The text in windows of `tokens` token ids, without what is left over."""
    ids = engine.encode(path.read_text(encoding="utf-8"))[1:]
    for first in range(0, len(ids) - tokens + 1, tokens):
        yield ids[first : first + tokens]


def perplexity(engine: Engine, texts: Path, tokens: int) -> dict[str, dict[str, float]]:
    """Per domain exp of the mean negative log-likelihood per token, and the same in bits per byte."""
    found = {}
    for domain, paths in read_domains(texts).items():
        loss, count, nbytes = 0.0, 0, 0
        for window in (window for path in paths for window in windows(engine, path, tokens)):
            logits = engine.logits([0, *window[:-1]])
            loss += float(cross_entropy(logits, torch.tensor(window), reduction="sum"))
            count += tokens
            assert engine.tokenizer is not None
            nbytes += len(engine.tokenizer.decode(window, False).encode())
        found[domain] = {"perplexity": math.exp(loss / count), "bits_per_byte": loss / math.log(2) / nbytes}
    return found


def measure(checkpoint: Path, texts: Path, experts: str, resident: str | None, tokens: int) -> dict[str, Any]:
    """The row of one store, which is made and deleted."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        convert(checkpoint, store, experts=experts, resident=resident)
        with offload.load(store, context=tokens + 1) as engine:
            found = perplexity(engine, texts, tokens)
            recipe, kernels = engine.store.manifest.recipe, engine.kernels.name
    means = {
        "perplexity": math.exp(sum(math.log(one["perplexity"]) for one in found.values()) / len(found)),
        "bits_per_byte": sum(one["bits_per_byte"] for one in found.values()) / len(found),
    }
    return {
        "checkpoint": checkpoint.name,
        "experts": experts,
        "resident": recipe["resident"],
        "kernels": kernels,
        "tokens_per_window": tokens,
        "mean": {name: round(value, 4) for name, value in means.items()},
        "domains": {domain: {name: round(value, 4) for name, value in one.items()} for domain, one in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--checkpoint", type=Path, default=Path("configs/demo"))
    parser.add_argument("--experts", action="append", help="default: bf16, fp8, int8-g64, int4-g32, nf4-b64")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    for experts in arguments.experts or STORES:
        numbers = measure(arguments.checkpoint, arguments.texts, experts, STORES.get(experts), arguments.tokens)
        print(json.dumps(numbers), flush=True)
        if arguments.record:
            append("embedded_perplexity", "python -m benchmarks.embedded.perplexity " + " ".join(sys.argv[1:]), numbers)


if __name__ == "__main__":
    main()
