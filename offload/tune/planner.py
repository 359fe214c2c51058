"""The planner's front: which machine, which hit rates, then `plan`.

Owns turning names and files into values, and looking at the machine it runs on where no file is given. Without a
probe's file the rates of this machine are unknown, and a plan with guessed rates would be worthless: it says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from offload.cache.lookahead import EARLY_ROUTERS
from offload.config import ModelConfig
from offload.errors import UsageError
from offload.tune.cost import Footprint
from offload.tune.hits import CURVES, POLICY, HitCurve, curve_of_trace
from offload.tune.machine_file import FOLDER, load_machine
from offload.tune.plan_report import PlanReport, plan_model
from offload.tune.setting import Setting

MACHINE_FILE = "machine.toml"
"""Where `probe` writes and `plan` looks when no file is named: in the working folder."""


class Model(Protocol):
    """A model by name with its size in every recipe."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def items(self) -> Sequence[Footprint]: ...


def plan(
    model: Model,
    *,
    machine: str | Path | None = None,
    ram: int | None = None,
    vram: int | None = None,
    context: int | None = None,
    prompt: int = Setting.prompt,
    hits: str | None = None,
    allow_slow: bool = False,
    prefill_chunk: int | None = None,
    split: str = Setting.split,
) -> PlanReport:
    """Plan `model`. Raises UsageError for files that are missing or malformed."""
    if machine is None and not Path(MACHINE_FILE).exists():
        shipped = ", ".join(sorted(path.stem for path in FOLDER.glob("*.toml")))
        raise UsageError(
            f"this machine has not been measured: run `expertpager probe` first (it writes {MACHINE_FILE}), "
            f"or give --machine with a file or one of: {shipped}"
        )
    return plan_model(
        model.name,
        model.kind,
        model.items,
        load_machine(machine or MACHINE_FILE),
        Setting(ram, vram, context, prompt, allow_slow, prefill_chunk, split),
        hit_curve(hits, model.items[0].config),
    )


def hit_curve(
    hits: str | None,
    config: ModelConfig,
    policy: str = POLICY,
    prefetch_depth: int | None = EARLY_ROUTERS,
    half_life: float | None = None,
) -> HitCurve:
    """The preset called `hits`, or the curve of the trace in that file under `policy`.

    `prefetch_depth`: layers ahead for which routers are applied early; None: nothing is read ahead. `half_life`: that
    of the policy, in tokens; None: its own.
    """
    if hits is None or hits in CURVES:
        return replace(CURVES[hits or "local"], prefetch_depth=prefetch_depth)
    if not Path(hits).exists():
        raise UsageError(f"--hits {hits}: neither a trace file nor one of {', '.join(CURVES)}")
    return curve_of_trace(hits, config, policy, prefetch_depth, half_life)
