"""What `--prefer-resident` saves and costs: bytes against KL and perplexity, over margins.

    python -m benchmarks.embedded.prefer_resident STORE TEXTS [--share 0.25] [--record]

Held-out text goes through the model token by token, as in decoding, with slots for a share of the experts. Per margin:
reads per token, the share of choices that exact routing would not have made, the mean KL divergence of the next-token
distribution from that of exact routing, and perplexity. With --record the curve is appended to
benchmarks/results/prefer_resident.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

import offload
from benchmarks.embedded.perplexity import windows
from benchmarks.record import append
from offload.engine.atlas import read_domains
from offload.engine.engine import Engine, ram_for_share
from offload.errors import BudgetError
from offload.store import Store

MARGINS = (None, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0)
CONTEXT = 512
ATTEMPTS = 32


@dataclass(frozen=True)
class Run:
    """One pass over the texts."""

    tokens: int
    logits: list[Tensor]
    targets: list[Tensor]
    telemetry: dict[str, Any]
    slots: int


def run(store: Path, texts: Path, margin: float | None, share: float, tokens: int, count: int) -> Run:
    """`count` windows of every domain, the cache warm from one to the next."""
    logits, targets = [], []
    with load(store, share, margin) as engine:
        for paths in read_domains(texts).values():
            found = [window for path in paths for window in windows(engine, path, tokens)]
            for window in found[:: max(1, len(found) // count)][:count]:
                logits.append(engine.logits([0, *window[:-1]], chunk=1))
                targets.append(torch.tensor(window))
        return Run(sum(map(len, targets)), logits, targets, engine.counters(), engine.plan.slots)


def load(store: Path, share: float, margin: float | None, context: int = CONTEXT, **options: Any) -> Engine:
    """The store with slots for exactly `share` of its experts, without anything learned before.

    A budget is for the whole process, and what the process takes differs by more than a small expert from one load to
    the next: the budget is corrected until the slots are right.
    """
    opened = Store.open(store)
    wanted = round(share * opened.config.n_routed_experts * len(opened.config.moe_layers))
    correction = 0
    for _ in range(ATTEMPTS):
        ram = ram_for_share(store, share, context=context) + correction
        options |= {"context": context, "prefer_resident": margin, "usage": "off", "prefetch": False}
        try:
            engine = offload.load(store, ram=ram, **options)
        except BudgetError:  # the process has grown by more than the slots above the floor
            correction += wanted * opened.layout.stride
            continue
        if engine.plan.slots == wanted:
            return engine
        correction += (wanted - engine.plan.slots) * opened.layout.stride
        engine.close()
    raise SystemExit(f"none of {ATTEMPTS} budgets gave {wanted} slots; the last one was {ram} bytes")


def point(margin: float | None, this: Run, exact: Run) -> dict[str, Any]:
    """The numbers of one margin beside exact routing."""
    loss = sum(float(cross_entropy(a, b, reduction="sum")) for a, b in zip(this.logits, this.targets, strict=True))
    divergence = sum(
        float(kl_div(a.log_softmax(1), b.log_softmax(1), reduction="sum", log_target=True))
        for a, b in zip(this.logits, exact.logits, strict=True)
    )
    ram, exact_ram = this.telemetry["ram"], exact.telemetry["ram"]
    choices = this.telemetry["choices"]
    return {
        "margin": margin,
        "slots": this.slots,
        "bytes_read_per_token": ram["bytes_read"] / this.tokens,
        "bytes_saved": 1 - ram["bytes_read"] / exact_ram["bytes_read"],
        "misses_per_token": ram["misses"] / this.tokens,
        "changed_choices": this.telemetry["changed_choices"] / choices if choices else 0.0,
        "kl_nats_per_token": divergence / this.tokens,
        "perplexity": math.exp(loss / this.tokens),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--share", type=float, default=0.25, help="of the experts that have a slot")
    parser.add_argument("--tokens", type=int, default=256, help="per window")
    parser.add_argument("--windows", type=int, default=2, help="per domain")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    store, texts, sizes = arguments.store, arguments.texts, (arguments.share, arguments.tokens, arguments.windows)
    exact = run(store, texts, None, *sizes)
    curve = []
    for margin in MARGINS:
        this = exact if margin is None else run(store, texts, margin, *sizes)
        curve.append({name: _rounded(value) for name, value in point(margin, this, exact).items()})
        print(json.dumps(curve[-1]), flush=True)
    numbers = {"tokens": exact.tokens, "share": arguments.share, "curve": curve}
    if arguments.record:
        append("prefer_resident", "python -m benchmarks.embedded.prefer_resident " + " ".join(sys.argv[1:]), numbers)


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
