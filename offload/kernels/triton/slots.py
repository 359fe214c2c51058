"""Routed experts out of a slab, for steps of few tokens: two launches, the slot table read on the device.

Owns gate|up with SiLU, and down, for one position (a token's j-th expert) per block row of the grid. A
position whose slot is -1 costs a load and a return.
"""

from __future__ import annotations

import triton
import triton.language as tl

from offload.kernels.triton.rows import arranged, row_products


@triton.jit
def gate_up_kernel(
    words_ptr,  # the slab as int32
    scale_ptr,  # the slab as the scale's type
    slots_ptr,
    x_ptr,
    h_ptr,
    pitch_words,
    pitch_scales,
    gate_words,
    up_words,
    gate_scales,
    up_scales,
    rows,
    cols,
    row_words,
    scale_cols,
    x_words,
    x_width,
    h_words,
    h_width,
    h_cols,
    top_k,
    aid,
    KIND: tl.constexpr,
    PER_WORD: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    N: tl.constexpr,
    UNITS: tl.constexpr,
):
    """h[p, n] = silu(gate[n] . x[p // top_k]) * (up[n] . x[p // top_k])."""
    p = tl.program_id(1)
    slot = tl.load(slots_ptr + p).to(tl.int64)
    if slot < 0:
        return
    # Both matrices in one loop, so that x is read once: the first N rows are of gate, the others of up.
    r = tl.arange(0, 2 * N)
    n = tl.program_id(0) * N + r % N
    word_at = tl.where(r < N, gate_words, up_words) + n * row_words
    scale_at = tl.where(r < N, gate_scales, up_scales) + n // BLOCK_ROWS * scale_cols
    both = row_products(
        words_ptr + slot * pitch_words, word_at, scale_ptr + slot * pitch_scales, scale_at, n < rows,
        x_ptr + p // top_k * x_width, cols, row_words, x_words, aid,
        KIND, PER_WORD, GROUP, 2 * N, UNITS,
    )  # fmt: skip
    gate, up = tl.split(tl.trans(tl.reshape(both, (2, N))))
    n = tl.program_id(0) * N + tl.arange(0, N)
    at, factor = arranged(n, h_words, KIND, PER_WORD)
    tl.store(h_ptr + p * h_width + at, gate / (1.0 + tl.exp(-gate)) * up * factor, mask=n < h_cols)


@triton.jit
def down_kernel(
    words_ptr,
    scale_ptr,
    slots_ptr,
    h_ptr,
    partial_ptr,
    pitch_words,
    pitch_scales,
    down_words,
    down_scales,
    rows,
    cols,
    row_words,
    scale_cols,
    h_words,
    h_width,
    aid,
    KIND: tl.constexpr,
    PER_WORD: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    N: tl.constexpr,
    UNITS: tl.constexpr,
):
    """partial[p, n] = down[n] . h[p]."""
    p = tl.program_id(1)
    slot = tl.load(slots_ptr + p).to(tl.int64)
    if slot < 0:
        return
    n = tl.program_id(0) * N + tl.arange(0, N)
    out = row_products(
        words_ptr + slot * pitch_words, down_words + n * row_words,
        scale_ptr + slot * pitch_scales, down_scales + n // BLOCK_ROWS * scale_cols, n < rows,
        h_ptr + p * h_width, cols, row_words, h_words, aid,
        KIND, PER_WORD, GROUP, N, UNITS,
    )  # fmt: skip
    tl.store(partial_ptr + p * rows + n, out, mask=n < rows)
