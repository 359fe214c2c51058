"""A finished generation beside the plan for this machine.

Owns finding the machine file and taking a generation apart into what the cost model predicts. The causes of a gap
are `compare`'s. Without a machine file nothing is computed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from offload.engine.beside_gpu import GpuRun
from offload.engine.request import GenerationResponse
from offload.engine.summary import Phase, Snapshot
from offload.errors import UsageError
from offload.store import Store
from offload.tune.budget import RamPlan
from offload.tune.compare import Comparison, Measured, compare
from offload.tune.cost import ModelCost, decode_cost, prefill_cost
from offload.tune.machine import MachineSpec
from offload.tune.machine_file import load_machine
from offload.tune.planner import MACHINE_FILE, hit_curve
from offload.tune.vram_budget import VramPlan

log = logging.getLogger("expertpager")

LEAST_DECODED = 16
"""Tokens below which a speed says little about the plan."""

LEAST_PROMPT = 32


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
) -> tuple[Phase, Phase]:
    """(prompt, decoding) from three readings of the counters."""
    prompt_s = response.prompt_tokens / response.prefill_tok_s if response.prefill_tok_s else 0.0
    decoded = response.completion_tokens - 1
    decode_s = decoded / response.decode_tok_s if response.decode_tok_s else 0.0
    return (
        Phase.between(before, after_prompt, response.prompt_tokens, prompt_s),
        Phase.between(after_prompt, now, decoded, decode_s),
    )


def beside_plan(
    model: ModelCost,
    machine: MachineSpec,
    plan: RamPlan,
    phases: tuple[Phase, Phase],
    *,
    cold: bool,
    early_routers: int | None,
    vram: Sequence[VramPlan] = (),
    hybrid: bool = False,
) -> tuple[Comparison, ...]:
    """Prompt and decoding against the plan with its usual hit rates; what was too short is left out.

    `cold`: no expert was resident when the prompt began. `early_routers`: see `RuntimeOptions`. `vram`: the budgets of
    the devices that computed, if any did; then nothing is compared with a machine of which no GPU is known. `hybrid`:
    whether the processor took a part.
    """
    prompt, decode = phases
    share, curve = plan.slots / plan.experts, hit_curve(None, model.config, prefetch_depth=early_routers)
    if vram:
        return _beside_gpu(model, machine, GpuRun(vram, plan, hybrid, curve), phases, cold) if machine.gpu else ()
    found = []
    if prompt.tokens >= LEAST_PROMPT and prompt.seconds:
        alike = curve.alike
        assumed = prefill_cost(model, machine, prompt.tokens, plan.chunk, 0.0 if cold else share, alike)
        sweep = prefill_cost(model, machine, prompt.tokens, plan.chunk, 0.0, alike)
        resident = max(0.0, 1 - prompt.bytes_read / sweep.read_nbytes)
        swept = prefill_cost(model, machine, prompt.tokens, plan.chunk, resident, alike)
        measured = Measured(prompt.seconds, prompt.stall_s, prompt.bytes_read)
        found.append(compare(f"prompt of {prompt.tokens} tokens", measured, assumed, swept))
    if decode.tokens >= LEAST_DECODED and decode.seconds:
        context = prompt.tokens + decode.tokens // 2
        actual = decode.demand(early_routers or 0)
        measured = Measured(
            decode.seconds / decode.tokens, decode.stall_s / decode.tokens, decode.bytes_read / decode.tokens
        )
        demands, learned = (curve.demand(share), actual), prompt.tokens / decode.tokens
        costs = [decode_cost(model, machine, demand, context, learned) for demand in demands]
        found.append(compare("decode, per token", measured, *costs))
    return tuple(found)


def _beside_gpu(
    model: ModelCost, machine: MachineSpec, run: GpuRun, phases: tuple[Phase, Phase], cold: bool
) -> tuple[Comparison, ...]:
    prompt, decode = phases
    found = []
    if prompt.tokens >= LEAST_PROMPT and prompt.seconds:
        found.append(run.compare_prompt(f"prompt of {prompt.tokens} tokens", model, machine, [prompt], cold=cold))
    if decode.tokens >= LEAST_DECODED and decode.seconds:
        context = prompt.tokens + decode.tokens // 2
        found.append(run.compare_decode("decode, per token", model, machine, [decode], context))
    return tuple(found)
