"""What a token costs: bytes, multiply-adds and seconds, from shapes and rates alone.

Owns the arithmetic. Pure: no files, no clocks, no measuring. How reading and computing go on beside each other within
a layer is `layer_clock`'s; layers add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Protocol

from offload.cache.lookahead import LEAST_ABSENT
from offload.config import ModelConfig
from offload.model.blocks import BLOCK
from offload.quant import get_codec
from offload.store.layout import ExpertLayout
from offload.tune.attention_shapes import AttentionShapes
from offload.tune.layer_clock import Demand, LayerWork, arrival_times, beside, last_arrivals, layer_time
from offload.tune.machine import MANY_ROWS, ROWS, FormatRate, MachineSpec

WAVE = 16
"""Experts of a prefill chunk whose reads are under way before the routed part of the layer begins."""


class Footprint(Protocol):
    """A model in one recipe: exact bytes, known from headers."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def recipe(self) -> str:
        """Name of the recipe."""
        ...

    @property
    def experts(self) -> str:
        """Codec of the routed experts."""
        ...

    @property
    def resident(self) -> str:
        """Codec of the resident linears."""
        ...

    @property
    def head(self) -> str:
        """Codec of the output head."""
        ...

    @property
    def embedding(self) -> str:
        """Codec of the token embedding."""
        ...

    @property
    def resident_nbytes(self) -> int:
        """All resident tensors as stored."""
        ...

    @property
    def store_nbytes(self) -> int:
        """The whole store."""
        ...

    @property
    def download_nbytes(self) -> int:
        """What is fetched to make it; 0 for a store."""
        ...


@dataclass(frozen=True)
class ModelCost:
    """Bytes and multiply-adds of a model in one recipe. Sizes of experts are exact, as on disk."""

    config: ModelConfig
    experts: str
    resident: str
    resident_nbytes: int
    head: str = "bf16"
    embedding: str = "bf16"

    @classmethod
    def of(cls, footprint: Footprint) -> ModelCost:
        item = footprint
        return cls(item.config, item.experts, item.resident, item.resident_nbytes, item.head, item.embedding)

    @property
    def layout(self) -> ExpertLayout:
        return ExpertLayout(get_codec(self.experts), self.config.hidden_size, self.config.moe_intermediate_size)

    @property
    def expert_nbytes(self) -> int:
        return self.layout.stride

    @property
    def expert_count(self) -> int:
        return len(self.config.moe_layers) * self.config.n_routed_experts

    @property
    def experts_nbytes(self) -> int:
        """All routed experts."""
        return self.expert_count * self.expert_nbytes

    @property
    def experts_per_token(self) -> int:
        return len(self.config.moe_layers) * self.config.num_experts_per_tok

    @property
    def token_nbytes(self) -> int:
        """Bytes of the routed experts one token uses: what it reads without a cache."""
        return self.experts_per_token * self.expert_nbytes

    @property
    def head_nbytes(self) -> int:
        """Bytes of the output head, all of which every token streams."""
        return get_codec(self.head).nbytes(self.config.vocab_size, self.config.hidden_size)

    @property
    def embedding_nbytes(self) -> int:
        """Bytes of the token embedding, of which a token reads one row."""
        return get_codec(self.embedding).nbytes(self.config.vocab_size, self.config.hidden_size)

    @property
    def resident_read_nbytes(self) -> int:
        """Bytes of resident weights that one token streams through the processor, head not included."""
        return max(0, self.resident_nbytes - self.head_nbytes - self.embedding_nbytes)

    @property
    def shared_parameters(self) -> int:
        """Parameters of the shared expert of one layer."""
        return 3 * self.config.moe_intermediate_size * self.config.n_shared_experts * self.config.hidden_size

    @property
    def shared_nbytes(self) -> int:
        """Bytes of the shared expert of one layer."""
        inner, hidden = self.config.moe_intermediate_size * self.config.n_shared_experts, self.config.hidden_size
        codec = get_codec(self.resident)
        return 2 * codec.nbytes(inner, hidden) + codec.nbytes(hidden, inner) if inner else 0

    @property
    def router_nbytes(self) -> int:
        """Bytes of one router, in bf16."""
        return 2 * self.config.n_routed_experts * self.config.hidden_size

    @property
    def attention_nbytes(self) -> int:
        """Bytes of the matrices of attention of all layers."""
        codec = get_codec(self.resident)
        matrices = AttentionShapes.of(self.config).matrices.values()
        return self.config.num_hidden_layers * sum(codec.nbytes(*shape) for shape in matrices)

    @property
    def vector_nbytes(self) -> int:
        """Bytes of vectors that a token of a prompt moves in a layer between products: each is written by one step and
        read by the next. Norms, sums and the results of experts are as wide as the hidden state; queries, keys and
        values are expanded, rotated, joined and laid out by heads."""
        config = self.config
        wide = (2 * config.num_experts_per_tok + 14) * config.hidden_size
        heads = 4 * config.num_attention_heads * (2 * config.qk_head_dim + config.v_head_dim)
        return 4 * (wide + heads)

    @property
    def resident_parameters(self) -> int:
        """Parameters of attention, dense layers, shared experts and routers."""
        return sum(rows * cols for rows, cols in _resident_shapes(self.config))


def _resident_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """[out, in] of the resident linears of all layers, without embedding and head."""
    hidden, moe = config.hidden_size, len(config.moe_layers)
    shared = config.moe_intermediate_size * config.n_shared_experts
    return (
        [*AttentionShapes.of(config).matrices.values()] * config.num_hidden_layers
        + [(3 * config.intermediate_size, hidden)] * (config.num_hidden_layers - moe)
        + [(3 * shared, hidden), (config.n_routed_experts, hidden)] * moe
    )


def ceiling_tok_s(token_nbytes: float, rate: float, hit: float = 0.0) -> float:
    """Tokens per second when `rate` bytes/s is all that limits and `hit` of the bytes need not pass this link."""
    return rate / (token_nbytes * (1 - hit)) if hit < 1 else float("inf")


@dataclass(frozen=True)
class Cost:
    """Seconds of one forward pass by what they are spent on; they add up to `total_s`."""

    experts_s: float
    """Processor streams and multiplies routed experts."""
    resident_s: float
    """Processor streams attention, shared experts, dense layers, head."""
    stall_s: float
    """Processor waits for the drive."""
    overhead_s: float
    read_nbytes: float
    """Bytes the drive delivers."""
    tokens: int = 1

    @property
    def total_s(self) -> float:
        return self.experts_s + self.resident_s + self.stall_s + self.overhead_s

    @property
    def tok_s(self) -> float:
        return self.tokens / self.total_s

    @property
    def binding(self) -> str:
        """What takes most of the time: `drive`, `memory` (or `compute` for long passes), `overhead`."""
        busy = self.experts_s + self.resident_s
        parts = {"drive": self.stall_s, "memory" if self.tokens == 1 else "compute": busy, "overhead": self.overhead_s}
        return max(parts, key=lambda name: parts[name])


def decode_cost(
    model: ModelCost, machine: MachineSpec, demand: Demand, context: int = 0, learned: float = 0.0
) -> Cost:
    """One decoded token at position `context` when `demand` is what becomes of its demands.

    `learned`: tokens of a prompt from which is learned meanwhile, per token that is decoded.
    """
    config, own = model.config, machine.format_rate(model.resident)
    layers, k = len(config.moe_layers), config.num_experts_per_tok
    attention = min(model.attention_nbytes, model.resident_read_nbytes)
    past = config.num_hidden_layers * AttentionShapes.of(config).past_flops * context
    attending = attention / (own.attention or own.read) + past / (machine.past_gflops * 1e9)
    work = LayerWork(
        k,
        model.expert_nbytes,
        model.expert_nbytes / machine.format_rate(model.experts).read,
        model.shared_nbytes / own.read,
        attending / config.num_hidden_layers,
        machine.layer_s,
    )
    layer = layer_time(machine, work, demand)
    head = model.head_nbytes / machine.format_rate(model.head).read
    resident = attending + (model.resident_read_nbytes - attention) / own.read + head + layers * layer.slowed_s
    overhead = config.num_hidden_layers * machine.layer_s + layers * k * demand.reads * machine.miss_s
    if demand.hit >= 1 and machine.plain:  # nothing can be displaced: what is learned waits for the head, beside it
        learning = config.num_hidden_layers * max(0.0, machine.layer_s - machine.plain.get("layer_s", 0.0))
        overhead -= min(learning, head)
    overhead += machine.token_s + learned * machine.learn_s
    if k * (1 - demand.hit) >= LEAST_ABSENT:  # else the runtime leaves them out
        router = model.router_nbytes / machine.format_rate("bf16").read + machine.foresee_s
        overhead += layers * demand.prefetch_depth * router
    return Cost(
        experts_s=layers * layer.experts_s,
        resident_s=resident,
        stall_s=layers * layer.waiting_s,
        overhead_s=overhead,
        read_nbytes=layers * k * demand.reads * model.expert_nbytes,
    )


def rows_seconds(rate: FormatRate, nbytes: float, parameters: float, rows: float) -> float:
    """Seconds of a product of `parameters` weights with `rows` rows.

    One row takes what streaming the `nbytes` takes, ROWS and MANY_ROWS rows what their products take; between them
    every further row adds as much, beyond them every row takes the same.
    """
    times = {1: nbytes / rate.read}
    for count, gflops in ((ROWS, rate.gflops), (MANY_ROWS, rate.gflops_many or rate.gflops)):
        times[count] = 2.0 * count * parameters / (gflops * 1e9)
    if rows >= MANY_ROWS:
        return max(times[1], times[MANY_ROWS] * rows / MANY_ROWS)
    low, high = (1, ROWS) if rows < ROWS else (ROWS, MANY_ROWS)
    each = (times[high] - times[low]) / (high - low)
    return max(times[1], times[low] + each * max(0.0, rows - low))


def distinct_experts(config: ModelConfig, tokens: int, alike: float = inf) -> float:
    """Experts of one layer that at least one of `tokens` consecutive tokens uses.

    Those of one text are alike: n of them use as many experts as n / (1 + (n - 1) / alike) that have nothing to do with
    each other, for which every expert is equally likely.
    """
    e = config.n_routed_experts
    independent = tokens / (1 + (tokens - 1) / alike)
    return float(e * (1 - (1 - config.num_experts_per_tok / e) ** independent))


def chunk_cost(
    model: ModelCost, machine: MachineSpec, tokens: int, start: int, share: float, alike: float = inf
) -> Cost:
    """One prefill chunk of `tokens` tokens after `start` others, when `share` of the experts are resident.

    `alike`: see `distinct_experts`. Everything the chunk uses is swept once; what is resident stays and is not read.
    """
    config = model.config
    layers, used = len(config.moe_layers), distinct_experts(config, tokens, alike)
    missing = used * (1 - share)
    rate, own = machine.format_rate(model.experts), machine.format_rate(model.resident)
    rows = tokens * config.num_experts_per_tok / used
    per_expert = rows_seconds(rate, model.expert_nbytes, config.expert_parameters, rows)
    compute = used * per_expert
    reading = missing * model.expert_nbytes / machine.drive_read + (machine.first_read_s if missing >= 1 else 0.0)
    # The first wave of reads goes on while the shared expert is computed, which they slow as they slow the others.
    wave = min(WAVE, missing) * model.expert_nbytes / machine.drive_read
    shared = rows_seconds(own, model.shared_nbytes, model.shared_parameters, tokens)
    with_reads, left = beside(machine, shared, wave)
    # Hits first, then misses as they come: the drive is ahead or behind, and those that come last are computed alone.
    reading = max(0.0, reading - wave) + left
    last = last_arrivals(missing, model.expert_nbytes) * per_expert
    compute, stall = beside(machine, compute, reading + last if missing >= 1 else 0.0)
    if missing >= 1:  # nothing but residents can be computed until the first reads end
        residents = (used - missing) * per_expert / machine.kernels_beside
        begun = arrival_times(machine, round(min(WAVE, missing)), model.expert_nbytes)[0]
        stall = max(stall, begun - with_reads - residents)
    resident = layers * (with_reads - shared)
    resident += rows_seconds(own, model.resident_read_nbytes, model.resident_parameters, tokens)
    resident += config.num_hidden_layers * attention_flops(config, tokens, start) / (machine.past_gflops * 1e9)
    miss_s = machine.miss_s if machine.prompt_miss_s is None else machine.prompt_miss_s
    layer_s = machine.layer_s if machine.prompt_layer_s is None else machine.prompt_layer_s
    layer_s += tokens * (machine.prompt_token_s + model.vector_nbytes / machine.ram_read)
    return Cost(
        experts_s=layers * compute,
        resident_s=resident,
        stall_s=layers * stall,
        overhead_s=config.num_hidden_layers * layer_s + layers * missing * miss_s,
        read_nbytes=layers * missing * model.expert_nbytes,
        tokens=tokens,
    )


def attention_flops(config: ModelConfig, tokens: int, start: int) -> float:
    """2 x multiply-adds of one layer's scores and sums for `tokens` tokens after `start` others.

    The first block of a context has keys and values of its own, later ones work on latents.
    """
    heads, first = config.num_attention_heads, min(tokens, max(0, BLOCK - start))
    expanded = config.qk_head_dim + config.v_head_dim
    later = tokens - first
    absorbed = AttentionShapes.of(config).past_flops * later * (start + first + later / 2)
    return 2.0 * heads * first * (start + first / 2) * expanded + absorbed


def prefill_cost(
    model: ModelCost, machine: MachineSpec, prompt: int, chunk: int, share: float, alike: float = inf
) -> Cost:
    """A whole prompt, cut into chunks; the head is applied to its last token only."""
    starts = range(0, prompt, chunk)
    parts = [chunk_cost(model, machine, min(chunk, prompt - start), start, share, alike) for start in starts]
    return Cost(
        sum(part.experts_s for part in parts),
        sum(part.resident_s for part in parts) + model.head_nbytes / machine.format_rate(model.head).read,
        sum(part.stall_s for part in parts),
        sum(part.overhead_s for part in parts) + machine.token_s,
        sum(part.read_nbytes for part in parts),
        prompt,
    )
