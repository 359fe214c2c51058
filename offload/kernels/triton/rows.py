"""Products of packed weight rows with few vectors: the inner loop of every decoding step.

Owns reading packed words and turning them into numbers, for all formats, on CUDA cores. Must not know
where a matrix lies or what its product is for: callers give the offset of each row.

A row is read as int32 words, four to a load of 16 bytes (a *unit*: 32 columns of int4, 16 of int8 and
fp8, 8 of bf16). Integer codes become floats without conversion instructions: an `&` and an `|` put the
code into the mantissa of 2^23, one subtraction takes 2^23 and the code's offset away, exactly. Codes that
lie higher in the word come out multiplied by a power of two, which is taken out of x beforehand, exactly
as well. Scales are applied once per unit. A weight thus costs about 3.3 instructions, which leaves the
loop bound by memory on every card (docs/GPU_KERNELS.md). Products and sums are fp32: x is not rounded at all.
"""

from __future__ import annotations

import triton
import triton.language as tl

INT4: tl.constexpr = tl.constexpr(0)
INT8: tl.constexpr = tl.constexpr(1)
FP8: tl.constexpr = tl.constexpr(2)
BF16: tl.constexpr = tl.constexpr(3)

MAGIC = 0x4B000000
"""Bits of 2^23. Handed to kernels as an argument: behind a constant the compiler splits `(w & m) | c` in two."""


@triton.jit
def unpack(w, i: tl.constexpr, KIND: tl.constexpr, magic):
    """Column i of each word as fp32, times 1 / x_factor(i) / out_factor."""
    if KIND == INT4:
        j: tl.constexpr = i if i < 5 else i - 3
        if i >= 5:
            w = w >> 12
        return ((w & (15 << (4 * j))) | magic).to(tl.float32, bitcast=True) - (8388608.0 + 8 * (1 << (4 * j)))
    elif KIND == INT8:
        odd: tl.constexpr = i % 2
        if i >= 2:
            w = w >> 16
        return ((w & (255 << (8 * odd))) | magic).to(tl.float32, bitcast=True) - (8388608.0 + 128 * (1 << (8 * odd)))
    elif KIND == FP8:
        # Sign and the seven bits of e4m3 go where fp32 has sign, low exponent bits and high mantissa bits: the
        # value times 2^-120, subnormals included. The arithmetic shift leaves copies of the sign, masked away.
        if i < 3:
            w = w << (24 - 8 * i)
        return ((w >> 4) & -0x78100000).to(tl.float32, bitcast=True)
    else:
        w = w << 16 if i == 0 else w & -65536
        return w.to(tl.float32, bitcast=True)


@triton.jit
def x_factor(i: tl.constexpr, KIND: tl.constexpr):
    """What x is multiplied with before it meets unpack(.., i, ..): a power of two."""
    if KIND == INT4:
        return 1.0 / (1 << (4 * (i if i < 5 else i - 3)))
    elif KIND == INT8:
        return 1.0 / (1 << (8 * (i % 2)))
    elif KIND == FP8:
        return 18446744073709551616.0  # 2^64: away from the underflow of 2^-120
    else:
        return 1.0


@triton.jit
def row_products(
    words_ptr,
    word_at,  # int32 [N]: first word of each row
    scale_ptr,
    scale_at,  # int32 [N]: first scale of each row
    row_mask,  # bool [N]
    x_ptr,
    cols,
    row_words,
    magic,
    KIND: tl.constexpr,
    PER_WORD: tl.constexpr,
    GROUP: tl.constexpr,  # columns of one scale
    N: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Rows times x [cols]: fp32 [N]."""
    acc = tl.zeros((N, UNITS), tl.float32)
    u = tl.arange(0, UNITS)
    for first in tl.range(0, row_words, 4 * UNITS):
        word = first + u[:, None] * 4 + tl.arange(0, 4)[None, :]  # [UNITS, 4]
        there = (word < row_words)[None, :, :] & row_mask[:, None, None]
        w = tl.load(words_ptr + word_at[:, None, None] + word[None, :, :], mask=there, other=0)  # [N, UNITS, 4]
        p = tl.zeros((N, UNITS, 4), tl.float32)
        for i in tl.static_range(PER_WORD):
            col = word * PER_WORD + i
            x = tl.load(x_ptr + col, mask=col < cols, other=0.0) * x_factor(i, KIND)  # [UNITS, 4]
            p = tl.fma(unpack(w, i, KIND, magic), tl.broadcast_to(x[None], p.shape), p)
        unit = tl.sum(p, 2)  # [N, UNITS]
        if KIND == BF16:
            acc += unit
        else:
            col = (first + u * 4) * PER_WORD
            there = (col < cols)[None, :] & row_mask[:, None]
            scale = tl.load(scale_ptr + scale_at[:, None] + (col // GROUP)[None, :], mask=there, other=0.0)
            scale = scale.to(tl.float32)
            if KIND == FP8:
                scale = scale * 72057594037927936.0  # 2^56: with x_factor, the 2^120 of unpack
            acc = tl.fma(unit, scale, acc)
    return tl.sum(acc, 1)


@triton.jit
def rows_kernel(
    words_ptr,
    scale_ptr,
    x_ptr,
    out_ptr,
    rows,  # of one batch
    cols,
    row_words,
    scale_cols,
    heads,
    head_rows,  # rows from one head's matrix to the next
    first_row,
    magic,
    KIND: tl.constexpr,
    PER_WORD: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,  # rows of one scale
    N: tl.constexpr,
    UNITS: tl.constexpr,
):
    """out[t, h, n] = W[h * head_rows + first_row + n] . x[t, h] for a block of N rows; a linear layer has one head."""
    vector = tl.program_id(0)  # t * heads + h. Fastest: programs that read the same rows run together
    n = tl.program_id(1) * N + tl.arange(0, N)
    row = vector % heads * head_rows + first_row + n
    out = row_products(
        words_ptr, row * row_words, scale_ptr, row // BLOCK_ROWS * scale_cols, n < rows,
        x_ptr + vector * cols, cols, row_words, magic,
        KIND, PER_WORD, GROUP, N, UNITS,
    )  # fmt: skip
    tl.store(out_ptr + vector * rows + n, out, mask=n < rows)


@triton.jit
def mlp_kernel(
    gate_words_ptr,
    gate_scale_ptr,
    up_words_ptr,
    up_scale_ptr,
    x_ptr,
    h_ptr,
    rows,
    cols,
    row_words,
    scale_cols,
    magic,
    KIND: tl.constexpr,
    PER_WORD: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    N: tl.constexpr,
    UNITS: tl.constexpr,
):
    """h[t, n] = silu(gate[n] . x[t]) * (up[n] . x[t]) for a block of N rows."""
    token = tl.program_id(0)
    n = tl.program_id(1) * N + tl.arange(0, N)
    scale_at = n // BLOCK_ROWS * scale_cols
    gate = row_products(
        gate_words_ptr, n * row_words, gate_scale_ptr, scale_at, n < rows,
        x_ptr + token * cols, cols, row_words, magic, KIND, PER_WORD, GROUP, N, UNITS,
    )  # fmt: skip
    up = row_products(
        up_words_ptr, n * row_words, up_scale_ptr, scale_at, n < rows,
        x_ptr + token * cols, cols, row_words, magic, KIND, PER_WORD, GROUP, N, UNITS,
    )  # fmt: skip
    tl.store(h_ptr + token * rows + n, gate / (1.0 + tl.exp(-gate)) * up, mask=n < rows)
