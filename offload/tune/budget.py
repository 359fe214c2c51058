"""One RAM budget for the whole process: who gets how much, decided before anything is allocated.

Owns the arithmetic and the refusal when a budget is too small. Pure: it takes numbers, allocates nothing
and asks no machine. Slots get what is left after everything else has its share.
"""

from __future__ import annotations

from dataclasses import dataclass

from offload.config import ModelConfig
from offload.errors import BudgetError
from offload.model.blocks import BLOCK
from offload.types import format_size

CHUNK_SHARE = 1 / 16
"""Share of the memory for slots that may go into longer prefill chunks instead. Each chunk is one sweep over the
experts it uses, so a chunk of twice the length halves what a long prompt reads."""

DEFAULT_CONTEXT = 4096
FREE_SHARE = 0.8
"""Share of the free RAM that is used when no budget is given."""

MIN_WAVE = 2
"""Fewest slots with which the executor makes progress: one being read while one is computed."""


@dataclass(frozen=True)
class RamPlan:
    """How the process uses its RAM, in bytes. `slots` hold one routed expert each."""

    process: int
    """Interpreter and libraries, measured before the model is loaded."""
    resident: int
    """Weights of every token: attention, router, shared expert, dense layers, embedding, head."""
    kv_cache: int
    working: int
    """Activations of one chunk, partial sums, staging."""
    chunk: int
    """Tokens of a prompt computed at once: each expert they use is read once for all of them."""
    slot_nbytes: int
    slots: int
    experts: int
    """Routed experts of the model: more slots than that are never made."""

    @property
    def fixed(self) -> int:
        return self.process + self.resident + self.kv_cache + self.working

    @property
    def total(self) -> int:
        return self.fixed + self.slots * self.slot_nbytes

    def describe(self) -> str:
        """One line for people."""
        share = 100 * self.slots / self.experts if self.experts else 100.0
        return (
            f"{format_size(self.total)} RAM: {self.slots} expert slots of {format_size(self.slot_nbytes)} "
            f"({share:.0f}% of {self.experts} experts), resident weights {format_size(self.resident)}, "
            f"KV cache {format_size(self.kv_cache)}, working memory {format_size(self.working)} for prompts in "
            f"chunks of {self.chunk}, process {format_size(self.process)}"
        )


def kv_cache_nbytes(config: ModelConfig, context: int, itemsize: int = 4, layers: range | None = None) -> int:
    """Bytes of the latent cache of `layers`, by default all, for `context` tokens; `itemsize`: of fp32, as on a CPU,
    unless given."""
    count = config.num_hidden_layers if layers is None else len(layers)
    return count * context * config.latent_dim * itemsize


def working_nbytes(config: ModelConfig, chunk: int, context: int) -> int:
    """Upper estimate of the activations alive at once for a chunk of `chunk` tokens, in bytes.

    Counted in fp32. Of the whole chunk: hidden states, their norm, the routed experts' outputs [chunk, K, H] and
    their sum. Of one block: the widest MLP, queries and latent outputs of attention. Besides: one head's attention
    scores of a block, and two logits rows.
    """
    per_token = (config.num_experts_per_tok + 5) * config.hidden_size
    per_block_token = (
        3 * config.hidden_size
        + 3 * max(config.intermediate_size, config.moe_intermediate_size * max(config.n_shared_experts, 1))
        + config.num_attention_heads * (2 * config.qk_head_dim + 2 * config.kv_lora_rank + 2 * config.v_head_dim)
        + 2 * context
    )
    return 4 * (chunk * per_token + min(chunk, BLOCK) * per_block_token + 2 * config.vocab_size)


def floor_slots(config: ModelConfig) -> int:
    """Slots of one token's working set: every routed expert that a single token uses."""
    return config.num_experts_per_tok * len(config.moe_layers)


def plan_ram(
    config: ModelConfig,
    *,
    limit: int,
    process: int,
    resident: int,
    slot_nbytes: int,
    context: int,
    allow_slow: bool = False,
    prefill_chunk: int | None = None,
) -> RamPlan:
    """Split `limit` bytes. Raises BudgetError, naming the numbers and the knob, when it is too small.

    `prefill_chunk`: see `longest_chunk`.

    Below one token's working set nearly every expert is read for every token, so that is refused unless
    `allow_slow`.
    """
    experts = config.n_routed_experts * len(config.moe_layers)
    kv_cache = kv_cache_nbytes(config, context)
    longest = longest_chunk(context, prefill_chunk)
    chunk = min(BLOCK, longest)
    working = working_nbytes(config, chunk, context)
    fixed = process + resident + kv_cache + working
    floor = min(floor_slots(config), experts)
    least = min(MIN_WAVE, experts) if allow_slow else floor
    spare = limit - fixed
    if spare < least * slot_nbytes:
        need = fixed + least * slot_nbytes
        reason = (
            f"below the floor of {floor} expert slots, one token's working set "
            f"({config.num_experts_per_tok} experts x {len(config.moe_layers)} layers)"
            if spare >= 0
            else "not enough even without expert slots"
        )
        advice = "; --allow-slow goes below the floor" if spare > 0 and not allow_slow else ""
        raise BudgetError(
            f"--ram {format_size(limit)} is {reason}: {format_size(fixed)} is needed for process "
            f"{format_size(process)}, resident weights {format_size(resident)}, KV cache of {context} tokens "
            f"{format_size(kv_cache)} and working memory {format_size(working)}, and a slot takes "
            f"{format_size(slot_nbytes)}; give --ram {need // 2**20 + 1}MiB or more, or a smaller --context{advice}"
        )
    longer = _longer_chunk(config, context, longest, _for_chunks(spare, floor * slot_nbytes))
    extra = working_nbytes(config, longer, context) - working
    slots = min(experts, (spare - extra) // slot_nbytes)
    return RamPlan(process, resident, kv_cache, working + extra, longer, slot_nbytes, slots, experts)


def longest_chunk(context: int, prefill_chunk: int | None) -> int:
    """Tokens of the longest chunk that may be made; `prefill_chunk` is the most that was asked for, None: no bound.

    Whole blocks from one on, which leave the bits as they are; a shorter chunk cannot, since it cuts the first block
    of attention, whose arithmetic is another than that of the blocks after it.
    """
    if prefill_chunk is None or prefill_chunk >= context:
        return context
    return prefill_chunk if prefill_chunk < BLOCK else prefill_chunk // BLOCK * BLOCK


def ram_for_slots(
    config: ModelConfig,
    slots: int,
    *,
    process: int,
    resident: int,
    slot_nbytes: int,
    context: int,
    prefill_chunk: int | None = None,
) -> int:
    """The smallest limit with which `plan_ram` makes `slots` slots."""
    fixed = process + resident + kv_cache_nbytes(config, context)
    floor = min(floor_slots(config), config.n_routed_experts * len(config.moe_layers)) * slot_nbytes
    longest = longest_chunk(context, prefill_chunk)
    chunk = least = min(BLOCK, longest)
    while True:
        limit = fixed + working_nbytes(config, chunk, context) + slots * slot_nbytes
        spare = limit - fixed - working_nbytes(config, least, context)
        # As much spare memory makes longer chunks, which may take back what this limit gave to slots.
        if _longer_chunk(config, context, longest, _for_chunks(spare, floor)) <= chunk:
            return limit
        chunk = min(chunk + BLOCK, longest)


def _for_chunks(spare: int, floor: int) -> int:
    """Of `spare` bytes, those that may make chunks longer: a share, and nothing that the `floor` of slots needs."""
    return max(0, min(int(spare * CHUNK_SHARE), spare - floor))


def _longer_chunk(config: ModelConfig, context: int, longest: int, spare: int) -> int:
    """Tokens of the longest chunk, in whole blocks up to `longest`, that takes at most `spare` bytes more than one."""
    if longest <= BLOCK:
        return longest
    per_token = working_nbytes(config, BLOCK + 1, context) - working_nbytes(config, BLOCK, context)
    return min(longest, BLOCK + spare // (per_token * BLOCK) * BLOCK)
