"""What a token costs: bytes, multiply-adds and seconds, from shapes and rates alone.

Owns the arithmetic. Pure: no files, no clocks, no measuring. The structure is the runtime's: every layer asks for its
missing experts at once, computes the resident ones meanwhile, then each missing one as it arrives; nothing is read
ahead of the layer. So a layer takes what the later of drive and processor takes, and layers add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import Protocol

from offload.config import ModelConfig
from offload.quant import get_codec
from offload.store.layout import ExpertLayout
from offload.tune.machine import MachineSpec

READ_PART_NBYTES = 2 << 20
"""Experts are read in parts of this size at the same time."""

GPU_FIXED_S = 0.011
"""Time per token on a GPU that is neither experts nor waiting, for a model of DeepSeek-V3's size."""


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
    def resident_parameters(self) -> int:
        """Parameters of attention, dense layers, shared experts and routers."""
        return sum(rows * cols for rows, cols in _resident_shapes(self.config))


def _resident_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """[out, in] of the resident linears of all layers, without embedding and head."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    queries = heads * config.qk_head_dim
    rank = config.q_lora_rank
    q = [(queries, hidden)] if rank is None else [(rank, hidden), (queries, rank)]
    attention = [
        *q,
        (config.latent_dim, hidden),
        (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
        (hidden, heads * config.v_head_dim),
    ]
    moe = len(config.moe_layers)
    shared = config.moe_intermediate_size * config.n_shared_experts
    return (
        attention * config.num_hidden_layers
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


def layer_seconds(misses: int, hits: int, *, compute: float, read: float, latency: float) -> tuple[float, float]:
    """(time, waiting) of the routed experts of one layer: hits are computed while misses are read in turn."""
    now = hits * compute
    waited = 0.0
    for number in range(1, misses + 1):
        arrival = latency + number * read
        waited += max(0.0, arrival - now)
        now = max(now, arrival) + compute
    return now, waited


def decode_cost(model: ModelCost, machine: MachineSpec, hit: float, context: int = 0) -> Cost:
    """One decoded token at position `context` when `hit` of the demands need no read.

    The number of misses of a layer is taken as binomial: layers with many misses wait longer than the average says.
    """
    config = model.config
    compute = model.expert_nbytes / machine.format_rate(model.experts).read
    k, waiting = config.num_experts_per_tok, 0.0
    for misses in range(k + 1):
        # A layer with few misses keeps few reads under way, and a drive is slower then.
        read = model.expert_nbytes / machine.drive_rate(misses * model.expert_nbytes / READ_PART_NBYTES)
        chance = comb(k, misses) * (1 - hit) ** misses * hit ** (k - misses)
        waiting += (
            chance * layer_seconds(misses, k - misses, compute=compute, read=read, latency=machine.drive_latency_s)[1]
        )
    layers = len(config.moe_layers)
    cache = 4 * config.num_hidden_layers * context * config.latent_dim
    resident = (
        model.resident_read_nbytes / machine.format_rate(model.resident).read
        + model.head_nbytes / machine.format_rate(model.head).read
        + cache / machine.ram_read
    )
    return Cost(
        experts_s=layers * k * compute,
        resident_s=resident,
        stall_s=layers * waiting,
        overhead_s=config.num_hidden_layers * machine.layer_s,
        read_nbytes=layers * k * (1 - hit) * model.expert_nbytes,
    )


def distinct_experts(config: ModelConfig, tokens: int) -> float:
    """Experts of one layer that at least one of `tokens` tokens uses, if all are equally likely."""
    e = config.n_routed_experts
    return float(e * (1 - (1 - config.num_experts_per_tok / e) ** tokens))


def chunk_cost(model: ModelCost, machine: MachineSpec, tokens: int, start: int, share: float) -> Cost:
    """One prefill chunk of `tokens` tokens after `start` others, when `share` of the experts are resident.

    Everything the chunk uses is swept once; what is resident stays and is not read.
    """
    config = model.config
    layers, used = len(config.moe_layers), distinct_experts(config, tokens)
    missing = used * (1 - share)
    rate, own = machine.format_rate(model.experts), machine.format_rate(model.resident)
    flops = 2.0 * tokens * config.num_experts_per_tok * config.expert_parameters
    compute = max(used * model.expert_nbytes / rate.read, flops / (rate.gflops * 1e9))
    per_expert = compute / used
    reading = missing * model.expert_nbytes / machine.drive_read + (machine.drive_latency_s if missing >= 1 else 0.0)
    # Hits first, then misses as they come: the drive is ahead or behind, and the last one is computed alone.
    stall = max(0.0, reading + per_expert - compute) if missing >= 1 else 0.0
    width = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    attention = 2.0 * tokens * (start + tokens / 2) * width
    resident = (
        max(
            model.resident_read_nbytes / own.read,
            2.0 * tokens * model.resident_parameters / (own.gflops * 1e9),
        )
        + model.head_nbytes / machine.format_rate(model.head).read
        + config.num_hidden_layers * attention / (machine.gflops * 1e9)
    )
    return Cost(
        experts_s=layers * compute,
        resident_s=resident,
        stall_s=layers * stall,
        overhead_s=config.num_hidden_layers * machine.layer_s,
        read_nbytes=layers * missing * model.expert_nbytes,
        tokens=tokens,
    )


def prefill_cost(model: ModelCost, machine: MachineSpec, prompt: int, chunk: int, share: float) -> Cost:
    """A whole prompt, cut into chunks."""
    starts = range(0, prompt, chunk)
    parts = [chunk_cost(model, machine, min(chunk, prompt - start), start, share) for start in starts]
    return Cost(
        sum(part.experts_s for part in parts),
        sum(part.resident_s for part in parts),
        sum(part.stall_s for part in parts),
        sum(part.overhead_s for part in parts),
        sum(part.read_nbytes for part in parts),
        prompt,
    )


def gpu_decode_s(model: ModelCost, machine: MachineSpec, vram_hit: float, hit: float) -> float:
    """Seconds per token with a GPU that holds all resident weights: the slower of RAM and drive, and a fixed part.

    A demand that VRAM does not serve costs one read of RAM, whether it is computed in place or copied.
    `hit` counts VRAM and RAM together.
    """
    ram = (1 - vram_hit) * model.token_nbytes / machine.ram_read
    drive = (1 - hit) * model.token_nbytes / machine.drive_read
    return max(ram, drive) + GPU_FIXED_S
