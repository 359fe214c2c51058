"""Showing that paging works: the same prompts with a quarter of the experts in RAM, then with all of them.

Owns the comparison and what it prints. Must not know how the store was made.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from offload.engine.engine import Engine, ram_for_share
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
    """Continue the prompts with 25% and with 100% of the experts in RAM and compare the tokens.

    Raises OffloadError when they differ, which would be a defect.
    """
    tokens: dict[float, list[list[int]]] = {}
    for share in (0.25, 1.0):
        ram = ram_for_share(store, share, context=CONTEXT)
        with Engine(store, RuntimeOptions(ram=ram, context=CONTEXT, usage="off")) as engine:
            echo(f"\n--ram {ram // 2**20 + 1}MiB, meant for {share:.0%} of the experts\n{engine.describe()[1]}")
            tokens[share] = []
            for prompt in PROMPTS:
                steps = list(engine.generate(engine.encode(prompt), max_tokens=max_tokens, **SAMPLING))
                tokens[share].append([step.token_id for step in steps])
                if share < 1:
                    echo(f"\n{prompt}{''.join(step.text for step in steps)}")
                echo(engine.summary().line())
    if tokens[0.25] != tokens[1.0]:
        raise OffloadError(f"the tokens depend on the RAM budget: {tokens}; please report this")
    count = sum(map(len, tokens[1.0]))
    echo(f"\nAll {count} tokens are the same: where experts lie never changes the answer.")
