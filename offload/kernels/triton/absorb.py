"""Queries into latent space: q times the rows of W_UK, the one product that runs along a packed matrix's rows.

Owns that product for few tokens (CUDA cores, fp32) and for many (tensor cores, weights rounded to bf16 as
everywhere). Scales belong to single rows here, so they are applied before the sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from offload.kernels.triton.dot import bf16, dot
from offload.kernels.triton.rows import BF16, FP8, INT2, INT3, INT4, NF4, unpack, x_factor
from offload.kernels.triton.tiles import byte_tile, narrow, nibble


@triton.jit
def absorb_rows_kernel(
    words_ptr, scale_ptr, q_ptr, out_ptr, heads, nope, head_rows, rank, row_words, scale_cols, aid,
    KIND: tl.constexpr, PER_WORD: tl.constexpr, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """out[t, h, c] = sum over n of q[t, h, n] * W[h * head_rows + n, c], for W words of columns; of int3 and int2 for
    W columns."""
    vector = tl.program_id(0)  # t * heads + h
    n = tl.arange(0, N)
    row = vector % heads * head_rows + n
    q = tl.load(q_ptr + vector * nope + n, mask=n < nope, other=0.0)[:, None]
    if KIND == INT3 or KIND == INT2:
        col = tl.program_id(1) * W + tl.arange(0, W)
        mask = (n < nope)[:, None] & (col < rank)[None, :]
        w = narrow(words_ptr.to(tl.pointer_type(tl.uint8)) + row[:, None] * row_words * 4, col[None, :], mask, KIND)
        at = scale_ptr + row[:, None] // BLOCK_ROWS * scale_cols + (col // GROUP)[None, :]
        q = tl.where(mask, q * tl.load(at, mask=mask, other=0.0).to(tl.float32), 0.0)
        tl.store(out_ptr + vector * rank + col, tl.sum(w * q, 0), mask=col < rank)
    else:
        word = tl.program_id(1) * W + tl.arange(0, W)
        mask = (n < nope)[:, None] & (word < row_words)[None, :]
        w = tl.load(words_ptr + row[:, None] * row_words + word[None, :], mask=mask, other=0)
        if KIND != BF16:
            group = (word * PER_WORD // GROUP)[None, :]
            at = scale_ptr + row[:, None] // BLOCK_ROWS * scale_cols + group
            q = q * tl.load(at, mask=mask, other=0.0).to(tl.float32)
            if KIND == FP8:
                q = q * 72057594037927936.0  # 2^56
        q = tl.where(mask, q, 0.0)
        for i in tl.static_range(PER_WORD):
            col = word * PER_WORD + i
            out = tl.sum(unpack(w, i, KIND, aid) * (q * x_factor(i, KIND)), 0)
            tl.store(out_ptr + vector * rank + col, out, mask=col < rank)


@triton.jit(do_not_specialize=["tokens"])
def absorb_tiles_kernel(
    raw_ptr, scale_ptr, q_ptr, out_ptr, tokens, heads, nope, head_rows, rank, row_bytes, scale_cols, aid,
    KIND: tl.constexpr, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The same for a tile of M tokens and C columns (two tiles of C, even and odd columns, for int4 and nf4)."""
    t = tl.program_id(0) * M + tl.arange(0, M)
    c = tl.program_id(1) * C + tl.arange(0, C)
    head = tl.program_id(2)
    n = tl.arange(0, N)
    row = (head * head_rows + n)[:, None]
    vector = (t.to(tl.int64) * heads + head)[:, None]
    mask = (t < tokens)[:, None] & (n < nope)[None, :]
    q = tl.load(q_ptr + vector * nope + n[None, :], mask=mask, other=0.0)
    q = bf16(q)
    per_byte: tl.constexpr = 2 if (KIND == INT4 or KIND == NF4) else 1
    col = c * per_byte
    mask = (n < nope)[:, None] & (col < rank)[None, :]
    raw_at = raw_ptr + row.to(tl.int64) * row_bytes
    out_at = out_ptr + vector * rank + col[None, :]
    out_mask = (t < tokens)[:, None] & (col < rank)[None, :]
    none = tl.zeros((M, C), tl.float32)
    if KIND == BF16:
        tl.store(out_at, dot(q, tl.load(raw_at + c[None, :], mask=mask, other=0), none), mask=out_mask)
    else:
        at = scale_ptr + row // BLOCK_ROWS * scale_cols + (col // GROUP)[None, :]
        scale = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if per_byte == 2:
            b = tl.load(raw_at + c[None, :], mask=mask, other=0)
            tl.store(out_at, dot(q, bf16(nibble(b, False, KIND, aid) * scale), none), mask=out_mask)
            odd = (t < tokens)[:, None] & (col + 1 < rank)[None, :]
            tl.store(out_at + 1, dot(q, bf16(nibble(b, True, KIND, aid) * scale), none), mask=odd)
        else:
            w = bf16(byte_tile(raw_at, c[None, :], mask, KIND) * scale)
            tl.store(out_at, dot(q, w, none), mask=out_mask)
