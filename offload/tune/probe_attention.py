"""Measuring a whole block of latent attention with one row: many small matrices, and the tokens before.

Owns a block of random weights and its two figures. Such a block runs slower than routed experts of the same bytes:
its matrices are smaller, wait for each other, and one of them is applied from both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from offload.config import LATENT_NORM_EPS
from offload.kernels import AttentionLayer, FusedKernels, Kernels
from offload.quant import QuantizedTensor, get_codec
from offload.tune.arena import ALIGNMENT, Arena, repeat
from offload.tune.attention_shapes import AttentionShapes
from offload.tune.timing import beyond, mean_time

PAST = 512
"""Tokens before the row that is measured with some."""

ROWS = 128
"""Rows of random weights in a matrix: whole blocks of every format."""

MOST_BLOCKS = 32

Empty = Callable[[Sequence[int], torch.dtype], Tensor]
"""Memory for a tensor of that shape and type."""


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype)


def measure_attention(
    kernels: FusedKernels, codec: str, shapes: AttentionShapes, arena: Arena, seconds: float, least: float = 0
) -> float:
    """Weight bytes per second of blocks in `codec` with one row and no tokens before it.

    Every call has another block, so that none stays in caches. `least`: seconds of a call that do not count.
    """
    nbytes, taken = block_time(kernels, codec, shapes, arena, seconds)
    return nbytes / beyond(taken, least)


def block_time(
    kernels: FusedKernels, codec: str, shapes: AttentionShapes, arena: Arena, seconds: float
) -> tuple[int, float]:
    """(bytes, seconds) of a block, the mean over as many as no cache holds, MOST_BLOCKS at most."""
    arena.clear()
    nbytes, first = random_layer(codec, shapes, arena.empty)
    count = arena.count(block_nbytes(codec, shapes), MOST_BLOCKS)
    layers = [first] + [_another(first, arena) for _ in range(1, count)]
    hidden, cache = torch.ones(1, shapes.hidden_size), torch.zeros(1, shapes.kv_lora_rank + shapes.qk_rope_head_dim)
    cos, sin = torch.ones(1, shapes.qk_rope_head_dim // 2), torch.zeros(1, shapes.qk_rope_head_dim // 2)

    def sweep() -> None:
        for layer in layers:
            kernels.attention(layer, hidden, cos, sin, cache, 0)

    return nbytes, mean_time(sweep, seconds) / count


def measure_past(kernels: Kernels, shapes: AttentionShapes, arena: Arena, seconds: float) -> float:
    """2 x multiply-adds per second, in units of 1e9, of one row with PAST tokens before it, in the absorbed form."""
    rng = torch.Generator().manual_seed(0)
    heads, latent, rope = shapes.num_attention_heads, shapes.kv_lora_rank, shapes.qk_rope_head_dim
    q_latent, q_rope = (torch.randn(1, heads, size, generator=rng) for size in (latent, rope))
    arena.clear()
    count = arena.count(4 * (PAST + 1) * (latent + rope) + ALIGNMENT, MOST_BLOCKS)
    caches = [arena.empty((PAST + 1, latent + rope), torch.float32) for _ in range(count)]
    for cache in caches:
        cache.normal_(generator=rng)

    def sweep() -> None:
        for cache in caches:
            kernels.mla_absorbed(q_latent, q_rope, cache, PAST, (latent + rope) ** -0.5)

    return count * PAST * shapes.past_flops / mean_time(sweep, seconds) / 1e9


def block_nbytes(codec: str, shapes: AttentionShapes) -> int:
    """Bytes of an arena that a block of random weights takes at most."""
    parts = [spec for shape in shapes.matrices.values() for spec in get_codec(codec).parts(*shape)]
    return sum(spec.nbytes + ALIGNMENT for spec in parts)


def random_layer(codec: str, shapes: AttentionShapes, empty: Empty = _empty) -> tuple[int, AttentionLayer]:
    """(bytes of the matrices, a block of random weights in memory of `empty`)."""
    rng = torch.Generator().manual_seed(0)

    def matrix(rows: int, cols: int) -> QuantizedTensor:
        # Some rows many times over: encoding random numbers for all would take longer than the measurement.
        form = get_codec(codec)
        parts = form.encode(torch.randn(min(rows, ROWS), cols, generator=rng) * cols**-0.5)
        found = {spec.suffix: empty(spec.shape, spec.dtype) for spec in form.parts(rows, cols)}
        for suffix, part in found.items():
            repeat(parts[suffix], part)
        return QuantizedTensor(form, rows, cols, found)

    found = {name: matrix(*shape) for name, shape in shapes.matrices.items()}
    rank = shapes.q_lora_rank
    layer = AttentionLayer(
        input_norm=torch.ones(shapes.hidden_size),
        q_a=found.get("q_a"),
        q_a_norm=None if rank is None else torch.ones(rank),
        q_b=found["q_b"],
        kv_a=found["kv_a"],
        kv_a_norm=torch.ones(shapes.kv_lora_rank),
        kv_b=found["kv_b"],
        o=found["o"],
        eps=1e-6,
        latent_eps=LATENT_NORM_EPS,
        scale=(shapes.qk_nope_head_dim + shapes.qk_rope_head_dim) ** -0.5,
        num_attention_heads=shapes.num_attention_heads,
        qk_nope_head_dim=shapes.qk_nope_head_dim,
        qk_rope_head_dim=shapes.qk_rope_head_dim,
        v_head_dim=shapes.v_head_dim,
    )
    return sum(item.nbytes for item in found.values()), layer


def _another(layer: AttentionLayer, arena: Arena) -> AttentionLayer:
    """The same weights in memory of their own."""

    def copied(weight: QuantizedTensor) -> QuantizedTensor:
        parts = {suffix: arena.empty(part.shape, part.dtype).copy_(part) for suffix, part in weight.parts.items()}
        return replace(weight, parts=parts)

    q_a = None if layer.q_a is None else copied(layer.q_a)
    q_b, kv_a, kv_b, o = (copied(weight) for weight in (layer.q_b, layer.kv_a, layer.kv_b, layer.o))
    return replace(layer, q_a=q_a, q_b=q_b, kv_a=kv_a, kv_b=kv_b, o=o)
