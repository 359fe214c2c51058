"""Products of packed weight rows with few vectors: the inner loop of every decoding step.

Owns reading packed words and turning them into numbers, for all formats, on CUDA cores. Must not know
where a matrix lies or what its product is for: callers give the offset of each row.

A row is read as int32 words, four to a load of 16 bytes (a *unit*: 64 columns of int2, 32 of int4 and nf4, 16
of int8 and fp8, 8 of bf16); int3, whose 32 columns are three words, has a loop of its own. Integer codes
become floats without conversion instructions: an `&` and an `|` put the code into the mantissa of 2^23, one
subtraction takes 2^23 and the code's offset away, exactly. Codes that lie higher in the word come out
multiplied by a power of two, which is taken out of x beforehand, exactly as well. Codes of nf4 are looked up.
Scales are applied once per unit. A weight of int4 thus costs about 3 instructions. Vectors are `arranged` beforehand,
so that loading x costs little beside the words. Products and sums are fp32: x is not rounded at all.
"""

from __future__ import annotations

import triton
import triton.language as tl

INT4: tl.constexpr = tl.constexpr(0)
INT8: tl.constexpr = tl.constexpr(1)
FP8: tl.constexpr = tl.constexpr(2)
BF16: tl.constexpr = tl.constexpr(3)
NF4: tl.constexpr = tl.constexpr(4)
INT3: tl.constexpr = tl.constexpr(5)
INT2: tl.constexpr = tl.constexpr(6)

MAGIC = 0x4B000000
"""Bits of 2^23, the `aid` of kernels for integers: behind a constant the compiler splits `(w & m) | c` in two.
The `aid` of kernels for nf4 is the address of its table."""


@triton.jit
def unpack(w, i: tl.constexpr, KIND: tl.constexpr, aid):
    """Column i of each word as fp32, divided by the power of two that x is multiplied with: `x_factor`, or that of
    `arranged` for int2. The scale of fp8 takes another 2^56."""
    if KIND == INT4:
        j: tl.constexpr = i if i < 5 else i - 3
        if i >= 5:
            w = w >> 12
        return ((w & (15 << (4 * j))) | aid).to(tl.float32, bitcast=True) - (8388608.0 + 8 * (1 << (4 * j)))
    elif KIND == INT8:
        odd: tl.constexpr = i % 2
        if i >= 2:
            w = w >> 16
        return ((w & (255 << (8 * odd))) | aid).to(tl.float32, bitcast=True) - (8388608.0 + 128 * (1 << (8 * odd)))
    elif KIND == FP8:
        # Sign and the seven bits of e4m3 go where fp32 has sign, low exponent bits and high mantissa bits: the
        # value times 2^-120, subnormals included. The arithmetic shift leaves copies of the sign, masked away.
        if i < 3:
            w = w << (24 - 8 * i)
        return ((w >> 4) & -0x78100000).to(tl.float32, bitcast=True)
    elif KIND == NF4:
        return tl.load(aid + ((w >> (8 * (i // 2) + 4 * (1 - i % 2))) & 15))  # the even column lies high
    elif KIND == INT2:
        k: tl.constexpr = i if i < 11 else i - 11
        if i >= 11:
            w = w >> 22
        return ((w & (3 << (2 * k))) | aid).to(tl.float32, bitcast=True) - (8388608.0 + 2 * (1 << (2 * k)))
    else:
        w = w << 16 if i == 0 else w & -65536
        return w.to(tl.float32, bitcast=True)


@triton.jit
def x_factor(i: tl.constexpr, KIND: tl.constexpr):
    """What x is multiplied with before it meets unpack(.., i, ..), where it is not `arranged`: a power of two."""
    if KIND == INT4:
        return 1.0 / (1 << (4 * (i if i < 5 else i - 3)))
    elif KIND == INT8:
        return 1.0 / (1 << (8 * (i % 2)))
    elif KIND == FP8:
        return 18446744073709551616.0  # 2^64: away from the underflow of 2^-120
    else:
        return 1.0


@triton.jit
def lifted(w, i: tl.constexpr, aid):
    """Code i of the eight int4 in each word as 1 + code / 2^e, e the exponent of `arranged`; `aid` is the bits of 1.0.

    A shift brings two codes to the top of the mantissa at once, an `&` and an `|` take one of them. The ones are
    subtracted once per unit, which costs less than what `unpack` subtracts from every code.
    """
    pair: tl.constexpr = i // 2
    w = w << (15 - 8 * pair) if pair < 2 else w >> (8 * pair - 15)
    value = ((w & (15 << (15 + 4 * (i % 2)))) | aid).to(tl.float32, bitcast=True)
    return value if i % 2 else value - 1.03125


@triton.jit
def arranged(col, x_words, KIND: tl.constexpr, PER_WORD: tl.constexpr):
    """Where column `col` of a vector lies for `row_products`, and the power of two it is multiplied with.

    The first column of every word, then the second of every word, ...: so a warp whose threads have a word each
    loads what they need side by side. int3, whose codes lie across words, takes x as it is.
    """
    i = col % PER_WORD
    if KIND == INT4:
        exponent = 8 - 4 * (i % 2)
    elif KIND == INT8:
        exponent = -8 * (i % 2)
    elif KIND == FP8:
        exponent = 0 * i + 64  # away from the underflow of unpack's 2^-120
    elif KIND == INT2:
        exponent = -2 * (i % 11)
    else:
        exponent = 0 * i
    at = col if KIND == INT3 else i * x_words + col // PER_WORD
    return at, ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def arrange_kernel(
    x_ptr, out_ptr, cols, padded, x_words, x_width,
    KIND: tl.constexpr, PER_WORD: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """x [V, cols] as `row_products` reads it, [V, x_width]; columns behind `cols`, to the end of the word, are 0."""
    vector = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * C + tl.arange(0, C)
    x = tl.load(x_ptr + vector * cols + col, mask=col < cols, other=0.0)
    at, factor = arranged(col, x_words, KIND, PER_WORD)
    tl.store(out_ptr + vector * x_width + at, x * factor, mask=col < padded)


@triton.jit
def three_bits(w0, w1, w2, i: tl.constexpr, aid):
    """Code i of the 32 in three words as fp32, times 1 / three_bits_factor(i)."""
    at: tl.constexpr = 3 * i % 32
    if i == 10:
        return ((((w0 >> 30) & 3) | ((w1 & 1) << 2)) | aid).to(tl.float32, bitcast=True) - 8388612.0
    elif i == 21:
        return ((((w1 >> 31) & 1) | ((w2 & 3) << 1)) | aid).to(tl.float32, bitcast=True) - 8388612.0
    else:
        w = w0 if i < 10 else (w1 if i < 21 else w2)
        j: tl.constexpr = at if at <= 20 else at - 12
        if at > 20:
            w = w >> 12
        return ((w & (7 << j)) | aid).to(tl.float32, bitcast=True) - (8388608.0 + 4 * (1 << j))


@triton.jit
def three_bits_factor(i: tl.constexpr):
    """`x_factor` of three_bits(.., i, ..)."""
    at: tl.constexpr = 0 if (i == 10 or i == 21) else 3 * i % 32
    return 1.0 / (1 << (at if at <= 20 else at - 12))


@triton.jit
def three_bit_row_products(
    words_ptr, word_at, scale_ptr, scale_at, row_mask, x_ptr, cols, row_words, aid,
    GROUP: tl.constexpr, N: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """`row_products` of int3, by 32 columns in three words."""
    acc = tl.zeros((N, UNITS), tl.float32)
    u = tl.arange(0, UNITS)
    for first in tl.range(0, row_words, 3 * UNITS):
        word = first + 3 * u
        at = words_ptr + word_at[:, None] + word[None, :]
        w0 = tl.load(at, mask=row_mask[:, None] & (word < row_words)[None, :], other=0)
        w1 = tl.load(at + 1, mask=row_mask[:, None] & (word + 1 < row_words)[None, :], other=0)
        w2 = tl.load(at + 2, mask=row_mask[:, None] & (word + 2 < row_words)[None, :], other=0)
        first_col = (first // 3 + u) * 32
        p = tl.zeros((N, UNITS), tl.float32)
        for i in tl.static_range(32):
            col = first_col + i
            x = tl.load(x_ptr + col, mask=col < cols, other=0.0) * three_bits_factor(i)
            p = tl.fma(three_bits(w0, w1, w2, i, aid), tl.broadcast_to(x[None], p.shape), p)
        there = row_mask[:, None] & (first_col < cols)[None, :]
        scale = tl.load(scale_ptr + scale_at[:, None] + (first_col // GROUP)[None, :], mask=there, other=0.0)
        acc = tl.fma(p, scale.to(tl.float32), acc)
    return tl.sum(acc, 1)


@triton.jit
def row_products(
    words_ptr, word_at, scale_ptr, scale_at, row_mask, x_ptr, cols, row_words, x_words, aid,
    KIND: tl.constexpr, PER_WORD: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Rows times x [cols], which is `arranged`: fp32 [N].

    word_at, scale_at int32 [N]: first word and first scale of each row, of `row_words` words and a scale for every
    GROUP columns; row_mask bool [N].
    """
    if KIND == INT3:
        return three_bit_row_products(
            words_ptr, word_at, scale_ptr, scale_at, row_mask, x_ptr, cols, row_words, aid, GROUP, N, UNITS
        )
    else:
        return unit_row_products(
            words_ptr, word_at, scale_ptr, scale_at, row_mask, x_ptr, cols, row_words, x_words, aid,
            KIND, PER_WORD, GROUP, N, UNITS,
        )  # fmt: skip


@triton.jit
def unit_row_products(
    words_ptr, word_at, scale_ptr, scale_at, row_mask, x_ptr, cols, row_words, x_words, aid,
    KIND: tl.constexpr, PER_WORD: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """`row_products` of formats whose columns are whole within a word, by units of four words.

    UNITS is 32 for every warp of a program: then a thread has one unit of each of the N rows and loads x in the same
    layout. With fewer, x would pass through shared memory for every column of a word, with two barriers each time.
    """
    acc = tl.zeros((N, UNITS), tl.float32)
    u = tl.arange(0, UNITS)
    one = aid ^ 0x74800000 if KIND == INT4 else aid  # the bits of 1.0, out of the compiler's sight as `aid` is
    x_words = tl.multiple_of(x_words, 4)
    for first in tl.range(0, row_words, 4 * UNITS):
        word = first + u[:, None] * 4 + tl.arange(0, 4)[None, :]  # [UNITS, 4]
        inside = word < row_words
        there = inside[None, :, :] & row_mask[:, None, None]
        w = tl.load(words_ptr + word_at[:, None, None] + word[None, :, :], mask=there, other=0)  # [N, UNITS, 4]
        p = tl.zeros((N, UNITS, 4), tl.float32)
        ones = tl.zeros((UNITS, 4), tl.float32)
        for i in tl.static_range(PER_WORD):
            x = tl.load(x_ptr + i * x_words + word, mask=inside, other=0.0)  # [UNITS, 4]
            if KIND == INT4:
                value = lifted(w, i, one)
                if i % 2:
                    ones = tl.fma(x, tl.full(ones.shape, 1.5, tl.float32), ones)
            else:
                value = unpack(w, i, KIND, aid)
            p = tl.fma(value, tl.broadcast_to(x[None], p.shape), p)
        if KIND == BF16:
            acc += tl.sum(p, 2)
        elif GROUP < 4 * PER_WORD:  # groups of int2 are smaller than a unit: a scale per word
            group = (word * PER_WORD // GROUP)[None, :, :]
            there = (word * PER_WORD < cols)[None, :, :] & row_mask[:, None, None]
            scale = tl.load(scale_ptr + scale_at[:, None, None] + group, mask=there, other=0.0)
            acc += tl.sum(p * scale.to(tl.float32), 2)
        else:
            unit = tl.sum(p, 2)  # [N, UNITS]
            if KIND == INT4:
                unit -= tl.sum(ones, 1)[None, :]
            col = (first + u * 4) * PER_WORD
            there = (col < cols)[None, :] & row_mask[:, None]
            scale = tl.load(scale_ptr + scale_at[:, None] + (col // GROUP)[None, :], mask=there, other=0.0)
            scale = scale.to(tl.float32)
            if KIND == FP8:
                scale = scale * 72057594037927936.0  # 2^56: with the 2^64 of x, the 2^120 of unpack
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
    x_words,
    x_width,
    heads,
    head_rows,  # rows from one head's matrix to the next
    first_row,
    aid,
    KIND: tl.constexpr,
    PER_WORD: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,  # rows of one scale
    N: tl.constexpr,
    UNITS: tl.constexpr,
):
    """out[t, h, n] = W[h * head_rows + first_row + n] . x[t, h] for a block of rows; a linear layer has one head."""
    vector = tl.program_id(0)  # t * heads + h. Fastest: programs that read the same rows run together
    n = tl.program_id(1) * N + tl.arange(0, N)
    row = vector % heads * head_rows + first_row + n
    out = row_products(
        words_ptr, row * row_words, scale_ptr, row // BLOCK_ROWS * scale_cols, n < rows,
        x_ptr + vector * x_width, cols, row_words, x_words, aid,
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
    x_words,
    x_width,
    h_words,
    h_width,
    h_cols,
    aid,
    KIND: tl.constexpr,
    PER_WORD: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    N: tl.constexpr,
    UNITS: tl.constexpr,
):
    """h[t, n] = silu(gate[n] . x[t]) * (up[n] . x[t]) for a block of rows."""
    token = tl.program_id(0)
    n = tl.program_id(1) * N + tl.arange(0, N)
    scale_at = n // BLOCK_ROWS * scale_cols
    gate = row_products(
        gate_words_ptr, n * row_words, gate_scale_ptr, scale_at, n < rows,
        x_ptr + token * x_width, cols, row_words, x_words, aid, KIND, PER_WORD, GROUP, N, UNITS,
    )  # fmt: skip
    up = row_products(
        up_words_ptr, n * row_words, up_scale_ptr, scale_at, n < rows,
        x_ptr + token * x_width, cols, row_words, x_words, aid, KIND, PER_WORD, GROUP, N, UNITS,
    )  # fmt: skip
    at, factor = arranged(n, h_words, KIND, PER_WORD)
    tl.store(h_ptr + token * h_width + at, gate / (1.0 + tl.exp(-gate)) * up * factor, mask=n < h_cols)
