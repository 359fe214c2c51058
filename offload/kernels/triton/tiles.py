"""Products of packed weights with many vectors: bf16 tensor cores, fp32 sums.

Owns decoding a tile of any format to exactly the bf16 weights that other engines see, and the loop over
columns. An output row depends on its own input row only, in an order given by the sizes of a tile, so it
does not matter with which rows it shares a tile. Must not know where a matrix lies.

Activations come as bf16 in the order in which a tile meets them: as they are, or for int4 and nf4 (two columns
to a byte) the even columns of a row first, then the odd ones, each part padded to `part` (`halves`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from offload.kernels.triton.dot import bf16, dot
from offload.kernels.triton.rows import BF16, FP8, INT3, INT4, INT8, NF4


@triton.jit
def scale_tile(
    scale_ptr, scale_at, n_mask, k, cols, GROUP: tl.constexpr, N: tl.constexpr, K: tl.constexpr, W: tl.constexpr
):
    """Scales of columns k .. k + K as fp32 [N, W], each repeated over its share of the W elements; or [N, 1]."""
    if GROUP >= K:
        s = tl.load(scale_ptr + scale_at + k // GROUP, mask=n_mask, other=0.0)
        return tl.expand_dims(s.to(tl.float32), 1)
    else:
        groups: tl.constexpr = K // GROUP
        g = k // GROUP + tl.arange(0, groups)
        mask = n_mask[:, None] & (g * GROUP < cols)[None, :]
        s = tl.load(scale_ptr + scale_at[:, None] + g[None, :], mask=mask, other=0.0).to(tl.float32)
        return tl.reshape(tl.broadcast_to(s[:, :, None], (N, groups, W // groups)), (N, W))


@triton.jit
def e4m3(b):
    """fp32 value of e4m3 bytes (not NaN), by integer operations: compute capability 8.0 has no such type."""
    b = b.to(tl.int32)
    bits = ((b & 0x80) << 24) | ((b & 0x7F) << 20)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def nibble(b, odd: tl.constexpr, KIND: tl.constexpr, aid):
    """fp32 values of the even or odd columns in bytes of int4 or nf4, without their scale."""
    if KIND == NF4:
        code = (b & 15) if odd else (b >> 4)
        return tl.load(aid + code.to(tl.int32))
    else:
        b = b.to(tl.int32)
        code = (b >> 4) if odd else (b & 15)
        return (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0  # 2^23 + code: cheaper than a conversion


@triton.jit
def narrow(raw_at, c, mask, KIND: tl.constexpr):
    """fp32 values of columns c of int3 or int2, without their scale; `raw_at` is the first byte of each row."""
    BITS: tl.constexpr = 3 if KIND == INT3 else 2
    byte, shift = c * BITS // 8, c * BITS % 8
    b = tl.load(raw_at + byte, mask=mask, other=0).to(tl.int32)
    if KIND == INT3:  # a code may lie across two bytes
        b |= tl.load(raw_at + byte + 1, mask=mask & (shift > 5), other=0).to(tl.int32) << 8
    return ((b >> shift) & ((1 << BITS) - 1)).to(tl.float32) - (1 << (BITS - 1))


@triton.jit
def byte_tile(raw_at, c, mask, KIND: tl.constexpr):
    """fp32 values of columns c of int8, fp8, int3 or int2, without their scale."""
    if KIND == INT8:
        return tl.load(raw_at + c, mask=mask, other=0).to(tl.float32) - 128.0
    elif KIND == FP8:
        return e4m3(tl.load(raw_at + c, mask=mask, other=0))
    else:
        return narrow(raw_at, c, mask, KIND)


@triton.jit
def tile_products(
    raw_ptr,  # bytes of the weight; bf16 for BF16
    row_at,  # [N]: where each row begins
    scale_ptr,
    scale_at,
    n_mask,
    x_ptr,
    x_at,  # [M]
    m_mask,
    cols,
    part,
    aid,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """x . W^T for one tile of rows of x and of W."""
    acc = tl.zeros((M, N), tl.float32)
    if KIND == INT4 or KIND == NF4:
        # Counted in bytes: only so does the compiler see that loads are aligned. A sum for each half: it only
        # overlaps loads with products that do not wait for each other.
        other = acc
        for first in tl.range(0, part, K // 2):
            c = first + tl.arange(0, K // 2)
            inside = c < part  # an odd column behind the last one meets a zero of x
            b = tl.load(raw_ptr + row_at[:, None] + c[None, :], mask=n_mask[:, None] & inside[None, :], other=0x88)
            scale = scale_tile(scale_ptr, scale_at, n_mask, first * 2, cols, GROUP, N, K, K // 2)
            mask = m_mask[:, None] & inside[None, :]
            x = tl.load(x_ptr + x_at[:, None] + c[None, :], mask=mask, other=0.0)
            w = bf16(nibble(b, False, KIND, aid) * scale)
            acc = dot(x, tl.trans(w), acc)
            x = tl.load(x_ptr + part + x_at[:, None] + c[None, :], mask=mask, other=0.0)
            w = bf16(nibble(b, True, KIND, aid) * scale)
            other = dot(x, tl.trans(w), other)
        return acc + other
    else:
        for k in tl.range(0, cols, K):
            c = k + tl.arange(0, K)
            there = c < cols
            mask = n_mask[:, None] & there[None, :]
            x = tl.load(x_ptr + x_at[:, None] + c[None, :], mask=m_mask[:, None] & there[None, :], other=0.0)
            if KIND == BF16:
                w = tl.load(raw_ptr + row_at[:, None] + c[None, :], mask=mask, other=0.0)
            else:
                scale = scale_tile(scale_ptr, scale_at, n_mask, k, cols, GROUP, N, K, K)
                w = bf16(byte_tile(raw_ptr + row_at[:, None], c[None, :], mask, KIND) * scale)
            acc = dot(x, tl.trans(w), acc)
        return acc


@triton.jit(do_not_specialize=["tokens"])
def tiles_kernel(
    raw_ptr,
    scale_ptr,
    x_ptr,
    out_ptr,
    tokens,
    rows,
    cols,
    part,
    x_width,  # elements of a row of x
    row_bytes,
    scale_cols,
    heads,
    head_rows,
    first_row,
    aid,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """out[t, h, n] = W[h * head_rows + first_row + n] . x[t, h] for a tile of tokens and rows."""
    t = tl.program_id(0) * M + tl.arange(0, M)
    n = tl.program_id(1) * N + tl.arange(0, N)
    head = tl.program_id(2)
    row = head * head_rows + first_row + n
    vector = (t * heads + head).to(tl.int64)
    acc = tile_products(
        raw_ptr, row.to(tl.int64) * row_bytes, scale_ptr, row // BLOCK_ROWS * scale_cols, n < rows,
        x_ptr, vector * x_width, t < tokens, cols, part, aid, KIND, GROUP, M, N, K,
    )  # fmt: skip
    at = out_ptr + vector[:, None] * rows + n[None, :]
    tl.store(at, acc, mask=(t < tokens)[:, None] & (n < rows)[None, :])
