"""Measuring a whole block of latent attention with one row: many small matrices, and the tokens before.

Owns a block of random weights and its two figures. Such a block runs slower than routed experts of the same bytes:
its matrices are smaller, wait for each other, and one of them is applied from both sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offload.config import LATENT_NORM_EPS, ModelConfig
from offload.kernels import AttentionLayer, FusedKernels, Kernels
from offload.quant import QuantizedTensor, get_codec
from offload.tune.timing import median_time

PAST = 512
"""Tokens before the row that is measured with some."""

ROWS = 128
"""Rows of random weights in a matrix: whole blocks of every format."""


@dataclass(frozen=True)
class AttentionShapes:
    """Sizes of a block, DeepSeek-V3's unless given, under the names of config.json."""

    hidden_size: int = 7168
    num_attention_heads: int = 128
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128

    @classmethod
    def of(cls, config: ModelConfig) -> AttentionShapes:
        """Those of a model."""
        return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__})


DEEPSEEK_V3 = AttentionShapes()


def measure_attention(
    kernels: FusedKernels, codec: str, shapes: AttentionShapes, *, buffer_nbytes: int, seconds: float
) -> float:
    """Weight bytes per second of blocks in `codec` with one row and no tokens before it.

    Every call has another block, so that none stays in caches.
    """
    nbytes, first = _random_layer(codec, shapes, 0)
    count = max(2, min(32, buffer_nbytes // nbytes))
    layers = [first] + [_random_layer(codec, shapes, seed)[1] for seed in range(1, count)]
    hidden, cache = torch.ones(1, shapes.hidden_size), torch.zeros(1, shapes.kv_lora_rank + shapes.qk_rope_head_dim)
    cos, sin = torch.ones(1, shapes.qk_rope_head_dim // 2), torch.zeros(1, shapes.qk_rope_head_dim // 2)

    def sweep() -> None:
        for layer in layers:
            kernels.attention(layer, hidden, cos, sin, cache, 0)

    return nbytes * count / median_time(sweep, seconds)


def measure_past(kernels: Kernels, shapes: AttentionShapes, *, buffer_nbytes: int, seconds: float) -> float:
    """2 x multiply-adds per second, in units of 1e9, of one row with PAST tokens before it, in the absorbed form."""
    rng = torch.Generator().manual_seed(0)
    heads, latent, rope = shapes.num_attention_heads, shapes.kv_lora_rank, shapes.qk_rope_head_dim
    q_latent, q_rope = (torch.randn(1, heads, size, generator=rng) for size in (latent, rope))
    count = max(2, min(32, buffer_nbytes // (4 * PAST * (latent + rope))))
    caches = [torch.randn(PAST + 1, latent + rope, generator=rng) for _ in range(count)]

    def sweep() -> None:
        for cache in caches:
            kernels.mla_absorbed(q_latent, q_rope, cache, PAST, (latent + rope) ** -0.5)

    return count * 2.0 * heads * PAST * (2 * latent + rope) / median_time(sweep, seconds) / 1e9


def _random_layer(codec: str, shapes: AttentionShapes, seed: int) -> tuple[int, AttentionLayer]:
    """(bytes of the matrices, a block of random weights)."""
    rng = torch.Generator().manual_seed(seed)
    heads, hidden, rank = shapes.num_attention_heads, shapes.hidden_size, shapes.q_lora_rank
    queries = heads * (shapes.qk_nope_head_dim + shapes.qk_rope_head_dim)

    def matrix(rows: int, cols: int) -> QuantizedTensor:
        # Some rows many times over: encoding random numbers for all would take longer than the measurement.
        found = get_codec(codec)
        parts = found.encode(torch.randn(min(rows, ROWS), cols, generator=rng) * cols**-0.5)
        specs = found.parts(rows, cols)
        return QuantizedTensor(found, rows, cols, {s.suffix: _repeat(parts[s.suffix], s.shape[0]) for s in specs})

    q_a = None if rank is None else matrix(rank, hidden)
    q_b = matrix(queries, hidden if rank is None else rank)
    kv_a = matrix(shapes.kv_lora_rank + shapes.qk_rope_head_dim, hidden)
    kv_b = matrix(heads * (shapes.qk_nope_head_dim + shapes.v_head_dim), shapes.kv_lora_rank)
    o = matrix(hidden, heads * shapes.v_head_dim)
    layer = AttentionLayer(
        input_norm=torch.ones(hidden),
        q_a=q_a,
        q_a_norm=None if rank is None else torch.ones(rank),
        q_b=q_b,
        kv_a=kv_a,
        kv_a_norm=torch.ones(shapes.kv_lora_rank),
        kv_b=kv_b,
        o=o,
        eps=1e-6,
        latent_eps=LATENT_NORM_EPS,
        scale=(shapes.qk_nope_head_dim + shapes.qk_rope_head_dim) ** -0.5,
        num_attention_heads=heads,
        qk_nope_head_dim=shapes.qk_nope_head_dim,
        qk_rope_head_dim=shapes.qk_rope_head_dim,
        v_head_dim=shapes.v_head_dim,
    )
    return sum(item.nbytes for item in (q_a, q_b, kv_a, kv_b, o) if item is not None), layer


def _repeat(part: Tensor, rows: int) -> Tensor:
    """`part` as often as it takes for `rows` rows of it."""
    return part.repeat(-(-rows // part.shape[0]), *[1] * (part.dim() - 1))[:rows].contiguous()
