"""Measuring a whole block of latent attention with one row: many small matrices, and the tokens before.

Owns a block of random weights and its two figures. Such a block runs slower than routed experts of the same bytes:
its matrices are smaller, wait for each other, and one of them is applied from both sides.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor

from offload.config import LATENT_NORM_EPS
from offload.kernels import AttentionLayer, FusedKernels, Kernels
from offload.quant import QuantizedTensor, get_codec
from offload.tune.attention_shapes import AttentionShapes
from offload.tune.timing import beyond, mean_time

PAST = 512
"""Tokens before the row that is measured with some."""

ROWS = 128
"""Rows of random weights in a matrix: whole blocks of every format."""


def measure_attention(
    kernels: FusedKernels, codec: str, shapes: AttentionShapes, *, buffer_nbytes: int, seconds: float, least: float = 0
) -> float:
    """Weight bytes per second of blocks in `codec` with one row and no tokens before it.

    Every call has another block, so that none stays in caches. `least`: seconds of a call that do not count.
    """
    nbytes, taken = block_time(kernels, codec, shapes, buffer_nbytes=buffer_nbytes, seconds=seconds)
    return nbytes / beyond(taken, least)


def block_time(
    kernels: FusedKernels, codec: str, shapes: AttentionShapes, *, buffer_nbytes: int, seconds: float
) -> tuple[int, float]:
    """(bytes, seconds) of a block, the mean over as many as fill the buffer."""
    nbytes, first = random_layer(codec, shapes)
    count = max(2, min(32, buffer_nbytes // nbytes))
    layers = [first] + [deepcopy(first) for _ in range(1, count)]
    hidden, cache = torch.ones(1, shapes.hidden_size), torch.zeros(1, shapes.kv_lora_rank + shapes.qk_rope_head_dim)
    cos, sin = torch.ones(1, shapes.qk_rope_head_dim // 2), torch.zeros(1, shapes.qk_rope_head_dim // 2)

    def sweep() -> None:
        for layer in layers:
            kernels.attention(layer, hidden, cos, sin, cache, 0)

    return nbytes, mean_time(sweep, seconds) / count


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

    return count * PAST * shapes.past_flops / mean_time(sweep, seconds) / 1e9


def random_layer(codec: str, shapes: AttentionShapes) -> tuple[int, AttentionLayer]:
    """(bytes of the matrices, a block of random weights)."""
    rng = torch.Generator().manual_seed(0)
    def matrix(rows: int, cols: int) -> QuantizedTensor:
        # Some rows many times over: encoding random numbers for all would take longer than the measurement.
        form = get_codec(codec)
        parts = form.encode(torch.randn(min(rows, ROWS), cols, generator=rng) * cols**-0.5)
        specs = form.parts(rows, cols)
        return QuantizedTensor(form, rows, cols, {s.suffix: _repeat(parts[s.suffix], s.shape[0]) for s in specs})

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


def _repeat(part: Tensor, rows: int) -> Tensor:
    """`part` as often as it takes for `rows` rows of it."""
    return part.repeat(-(-rows // part.shape[0]), *[1] * (part.dim() - 1))[:rows].contiguous()
