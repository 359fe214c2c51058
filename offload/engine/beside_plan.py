"""A finished generation beside the plan for this machine.

Owns finding the machine file and taking a generation apart into what the cost model predicts. The causes of a gap
are `compare`'s. Without a machine file nothing is computed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from offload.engine.request import GenerationResponse
from offload.engine.summary import Snapshot
from offload.errors import UsageError
from offload.store import Store
from offload.tune.budget import RamPlan
from offload.tune.compare import Comparison, Measured, compare
from offload.tune.cost import ModelCost, decode_cost, prefill_cost
from offload.tune.hits import CURVES
from offload.tune.machine import MachineSpec
from offload.tune.machine_file import load_machine
from offload.tune.planner import MACHINE_FILE

log = logging.getLogger("expertpager")

LEAST_DECODED = 16
"""Tokens below which a speed says little about the plan."""

LEAST_PROMPT = 32


@dataclass(frozen=True)
class RunPhase:
    """Prompt or decoding of one generation. `hits` and `misses` are demands of experts."""

    tokens: int
    seconds: float
    stall_s: float
    read_nbytes: int
    hits: int
    misses: int


def machine_at_hand(store: Path) -> MachineSpec | None:
    """machine.toml of the store or of the working folder; None where there is none, or one that is malformed."""
    for path in (store / MACHINE_FILE, Path(MACHINE_FILE)):
        if path.exists():
            try:
                return load_machine(path)
            except UsageError as fault:
                log.warning("not compared with the plan: %s", fault)
                return None
    return None


def model_cost(store: Store) -> ModelCost:
    """What the cost model needs to know of an opened store."""
    recipe = store.manifest.recipe
    return ModelCost(
        store.config,
        recipe["experts"],
        recipe["resident"],
        store.resident_nbytes,
        store.codec_name("lm_head"),
        store.codec_name("model.embed_tokens"),
    )


def phases_of(
    response: GenerationResponse, before: Snapshot, after_prompt: Snapshot, now: Snapshot
) -> tuple[RunPhase, RunPhase]:
    """(prompt, decoding) from three readings of the counters."""
    prompt_s = response.prompt_tokens / response.prefill_tok_s if response.prefill_tok_s else 0.0
    decoded = response.completion_tokens - 1
    decode_s = decoded / response.decode_tok_s if response.decode_tok_s else 0.0
    return (
        _phase(response.prompt_tokens, prompt_s, before, after_prompt),
        _phase(decoded, decode_s, after_prompt, now),
    )


def _phase(tokens: int, seconds: float, since: Snapshot, now: Snapshot) -> RunPhase:
    spent = now.ram.minus(since.ram)
    stall = sum(now.layer_stall_s) - sum(since.layer_stall_s)
    return RunPhase(tokens, seconds, stall, spent.bytes_read, spent.hits, spent.misses)


def beside_plan(
    model: ModelCost, machine: MachineSpec, plan: RamPlan, phases: tuple[RunPhase, RunPhase], *, cold: bool
) -> tuple[Comparison, ...]:
    """Prompt and decoding against the plan with its usual hit rates; what was too short is left out.

    `cold`: no expert was resident when the prompt began.
    """
    prompt, decode = phases
    share, curve = plan.slots / plan.experts, CURVES["local"]
    found = []
    if prompt.tokens >= LEAST_PROMPT and prompt.seconds:
        alike = curve.alike
        assumed = prefill_cost(model, machine, prompt.tokens, plan.chunk, 0.0 if cold else share, alike)
        sweep = prefill_cost(model, machine, prompt.tokens, plan.chunk, 0.0, alike)
        resident = max(0.0, 1 - prompt.read_nbytes / sweep.read_nbytes)
        actual = prefill_cost(model, machine, prompt.tokens, plan.chunk, resident, alike)
        measured = Measured(prompt.seconds, prompt.stall_s, prompt.read_nbytes)
        found.append(compare(f"prompt of {prompt.tokens} tokens", measured, assumed, actual))
    if decode.tokens >= LEAST_DECODED and decode.seconds:
        context = prompt.tokens + decode.tokens // 2
        hit = decode.hits / max(1, decode.hits + decode.misses)
        measured = Measured(
            decode.seconds / decode.tokens, decode.stall_s / decode.tokens, decode.read_nbytes / decode.tokens
        )
        expected = decode_cost(model, machine, curve.at(share), context)
        found.append(compare("decode, per token", measured, expected, decode_cost(model, machine, hit, context)))
    return tuple(found)
