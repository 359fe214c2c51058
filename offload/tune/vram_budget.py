"""One VRAM budget per device: who gets how much, decided before anything is allocated.

Owns the arithmetic and the refusal when a budget is too small. Pure: it takes numbers, allocates nothing and
asks no device. Slots get what is left after everything else has its share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from offload.config import ModelConfig
from offload.errors import BudgetError
from offload.kernels.device import FEW_TOKENS
from offload.model.blocks import BLOCK
from offload.tiers.staging import staging_nbytes
from offload.tiers.vram_memory import SHORT
from offload.tune.budget import kv_cache_nbytes, working_nbytes
from offload.types import format_size

FREE_SHARE = 0.94
"""Share of the free VRAM that is used when no budget is given: a desktop and late modules of the driver need some of
the rest."""

LEAST_WITH_LENDING = 24
"""Fewest slots that must stay while others are lent to a prompt: three waves of its sweep."""

MIN_SLOTS = 2
"""Fewest slots with which the tier makes progress: one being filled while one is computed."""

DEVICE_CHUNK = 2048
"""Tokens of a prompt computed at once on a device. A chunk copies every expert it uses once, so it is long; and it
is fixed, because kernels may choose their tiles by the number of tokens: the bits must not depend on a budget. Only
`prefill_chunk` makes it shorter."""


@dataclass(frozen=True)
class VramPlan:
    """How one device's memory is used, in bytes. `slots` hold one routed expert each."""

    name: str
    layers: range
    """Decoder layers of the device."""
    driver: int
    """Driver and libraries."""
    resident: int
    kv_cache: int
    working: int
    """Activations of one chunk, partial sums, lists of slots."""
    slot_nbytes: int
    slots: int
    lent: int
    """Slots that long prompts borrow for their activations; decoding has all of them."""
    experts: int
    """Routed experts of these layers: more slots than that are never made."""

    @property
    def fixed(self) -> int:
        return self.driver + self.resident + self.kv_cache + self.working

    @property
    def total(self) -> int:
        return self.fixed + self.slots * self.slot_nbytes

    def describe(self) -> str:
        """One line for people."""
        share = 100 * self.slots / self.experts if self.experts else 100.0
        return (
            f"{format_size(self.total)} VRAM of {self.name}, layers {self.layers.start} to {self.layers.stop - 1}: "
            f"{self.slots} expert slots of {format_size(self.slot_nbytes)} ({share:.0f}% of {self.experts} experts), "
            + (f"{self.lent} of which long prompts borrow, " if self.lent else "")
            + f"resident weights {format_size(self.resident)}, KV cache {format_size(self.kv_cache)}, "
            f"working memory {format_size(self.working)}, driver {format_size(self.driver)}"
        )


@dataclass(frozen=True)
class DeviceDemand:
    """What a device must hold besides slots."""

    layers: range
    resident: int
    """Bytes of the resident weights of `layers`, with the head on the device that computes it."""
    context: int
    """Tokens of the KV cache."""
    chunk: int
    """Tokens computed at once."""
    few: int = 0
    """Bytes that latent attention takes for the longest pass it splits over the context (`scratch_nbytes`)."""
    recorded: int = 0
    """The same for one token. Recorded steps keep it: their memory is nobody else's."""
    latent_itemsize: int = 4
    """Bytes of a number in the KV cache."""
    libraries: int = 0
    """Bytes that libraries allocate beside the tensors and keep."""


def device_demand(
    config: ModelConfig,
    layers: range,
    *,
    resident: int,
    context: int,
    chunk: int,
    scratch: Callable[[int, int, int, int], int],
    latent_itemsize: int,
    libraries: int = 0,
) -> DeviceDemand:
    """What the device of `layers` must hold; `scratch` is its kernels' `scratch_nbytes`."""
    attention = config.num_attention_heads, config.kv_lora_rank, context
    few, recorded = (scratch(min(tokens, chunk), *attention) for tokens in (FEW_TOKENS, 1))
    return DeviceDemand(layers, resident, context, chunk, few, recorded, latent_itemsize, libraries)


def default_limit(free: int, driver: int) -> int:
    """The budget of a device where none is given, in bytes.

    `free` is what its driver reports to a process that uses it: most of what `driver` foresees is taken by then, and
    the little that comes later is less than the share of `free` that is left alone.
    """
    return driver + int(free * FREE_SHARE)


def device_working_nbytes(config: ModelConfig, demand: DeviceDemand, own_tokens: int) -> int:
    """Bytes besides weights, cache and slots: what stays, and the largest of what takes turns.

    `own_tokens`: tokens of a pass whose expert outputs have memory of their own.
    """
    outputs = 4 * config.num_experts_per_tok * config.hidden_size  # per token
    turns = max(
        working_nbytes(config, demand.chunk, demand.context) - demand.chunk * outputs,
        demand.few + working_nbytes(config, min(demand.chunk, SHORT), 1),
        4 * min(demand.chunk, BLOCK) * (config.vocab_size + 2 * config.hidden_size),  # logits of a block
    )
    moe_layers = sum(layer in config.moe_layers for layer in demand.layers)
    lists = staging_nbytes(demand.chunk, FEW_TOKENS, config.num_experts_per_tok, config.n_routed_experts)
    lists += 4 * moe_layers * config.n_routed_experts
    kept = demand.recorded + demand.libraries + working_nbytes(config, 1, 1)
    return turns + own_tokens * outputs + lists + kept


def plan_vram(
    config: ModelConfig,
    demand: DeviceDemand,
    *,
    name: str,
    limit: int,
    slot_nbytes: int,
    lendable: int,
    driver: int,
    share: float = 1.0,
    rounding: Callable[[int], int] = lambda nbytes: 0,
) -> VramPlan:
    """Split `limit` bytes of the device `name`; `driver` of them go to driver and libraries, `rounding(n)` are lost
    where n bytes are allocated in many tensors. No more slots are made than for `share` (0..1) of the experts.

    `lendable`: slots that hold the expert outputs of a chunk. Where not all experts fit but enough of them, these
    outputs get no memory of their own: decoding has it as slots, and a long prompt borrows them. Raises BudgetError,
    naming the numbers and the knob, when the budget is too small.
    """
    moe = [layer for layer in demand.layers if layer in config.moe_layers]
    experts = config.n_routed_experts * len(moe)
    kv_cache = kv_cache_nbytes(config, demand.context, demand.latent_itemsize, demand.layers)
    working, short = (
        nbytes + rounding(demand.resident + kv_cache + nbytes)
        for nbytes in (device_working_nbytes(config, demand, n) for n in (demand.chunk, min(SHORT, demand.chunk)))
    )
    room, lent = limit - driver - demand.resident - kv_cache, 0
    if (room - working) // slot_nbytes < experts and (room - short) // slot_nbytes >= lendable + LEAST_WITH_LENDING:
        lent, working = lendable, short
    fixed = VramPlan(name, demand.layers, driver, demand.resident, kv_cache, working, slot_nbytes, 0, lent, experts)
    least = min(MIN_SLOTS, experts)
    slots = min(max(least, round(share * experts)), max(0, limit - fixed.fixed) // slot_nbytes)
    if slots < least or fixed.fixed > limit:
        need = fixed.fixed + least * slot_nbytes
        raise BudgetError(
            f"--vram {format_size(limit)} of {name} is not enough: driver {format_size(driver)}, resident weights "
            f"{format_size(demand.resident)}, KV cache of {demand.context} tokens {format_size(kv_cache)}, working "
            f"memory {format_size(working)} and {least} expert slots of {format_size(slot_nbytes)} take "
            f"{format_size(need)}; give --vram {need // 2**20 + 1}MiB or more, a smaller --context, or --device cpu"
        )
    return replace(fixed, slots=slots)
