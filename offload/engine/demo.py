"""Showing that paging works: the same prompts with a quarter of the experts in memory, then with all of them.

Owns the comparison and what it prints. Must not know how the store was made.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from offload.engine.engine import Engine
from offload.engine.options import RuntimeOptions
from offload.errors import OffloadError

PROMPTS = (
    "    def __init__(self",
    "#ifndef _",
    "Permission is hereby granted",
    "The above copyright notice",
    "Die Dateien",
)
"""Beginnings of the kinds of text that the embedded model was trained on."""

CONTEXT = 512
SAMPLING: dict[str, Any] = {"temperature": 0.7, "seed": 1, "ignore_eos": True}


def show_paging(store: Path, *, max_tokens: int, echo: Callable[..., None]) -> None:
    """Continue the prompts with 25% and with 100% of the experts in RAM, on a GPU also in VRAM, and compare the tokens.

    Raises OffloadError when they differ, which would be a defect.
    """
    tokens: dict[float, list[list[int]]] = {}
    for share in (0.25, 1.0):
        # The engine makes the budget itself: what the process takes is known when GPU, kernels and tokenizer are there.
        with Engine(store, RuntimeOptions(context=CONTEXT, usage="off"), share=share) as engine:
            echo(f"\n{_budgets(engine)}, meant for {share:.0%} of the experts")
            for line in engine.describe()[1:]:
                echo(line)
            tokens[share] = []
            for prompt in PROMPTS:
                steps = list(engine.generate(engine.encode(prompt), max_tokens=max_tokens, **SAMPLING))
                tokens[share].append([step.token_id for step in steps])
                if share < 1:
                    echo(f"\n{prompt}{''.join(step.text for step in steps)}")
                echo(engine.summary().line())
    if tokens[0.25] != tokens[1.0]:
        raise OffloadError(f"the tokens depend on the budget: {tokens}; please report this")
    count = sum(map(len, tokens[1.0]))
    echo(f"\nAll {count} tokens are the same: where experts lie never changes the answer.")


def _budgets(engine: Engine) -> str:
    """The options that give the engine's budgets."""
    vram = f" --vram {max(plan.total for plan in engine.vram_plans) // 2**20 + 1}MiB" if engine.vram_plans else ""
    return f"--ram {engine.plan.total // 2**20 + 1}MiB{vram}"
