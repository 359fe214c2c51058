"""Norm, rotation, weighted sum: the kernels between matrix products. One fp32 program per row."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, out_ptr, width, eps, WIDTH: tl.constexpr):
    """out[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, WIDTH)
    x = tl.load(x_ptr + row * width + c, mask=c < width, other=0.0)
    weight = tl.load(weight_ptr + c, mask=c < width, other=0.0)
    out = x / tl.sqrt_rn(tl.sum(x * x, 0) / width + eps) * weight
    tl.store(out_ptr + row * width + c, out, mask=c < width)


@triton.jit
def rope_kernel(x_ptr, cos_ptr, sin_ptr, out_ptr, heads, half, HALF: tl.constexpr):
    """Rotate the interleaved pairs of x[t, h] by the angles of t."""
    row = tl.program_id(0)  # t * heads + h
    i = tl.arange(0, HALF)
    mask = i < half
    at = row.to(tl.int64) * half * 2 + 2 * i
    even, odd = tl.load(x_ptr + at, mask=mask), tl.load(x_ptr + at + 1, mask=mask)
    angle = row // heads * half + i
    cos, sin = tl.load(cos_ptr + angle, mask=mask), tl.load(sin_ptr + angle, mask=mask)
    tl.store(out_ptr + at, even * cos - odd * sin, mask=mask)
    tl.store(out_ptr + at + 1, even * sin + odd * cos, mask=mask)


@triton.jit
def combine_kernel(partial_ptr, ids_ptr, weights_ptr, out_ptr, top_k, width, K: tl.constexpr, WIDTH: tl.constexpr):
    """out[t] = sum over j, in ascending order of ids[t, j], of weights[t, j] * partial[t * top_k + j]."""
    token = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    j = tl.arange(0, K)
    ids = tl.load(ids_ptr + token * top_k + j, mask=j < top_k, other=2**62)
    total = tl.zeros((WIDTH,), tl.float32)
    for _ in range(top_k):
        smallest = tl.min(ids, 0)
        chosen = tl.sum(tl.where(ids == smallest, j, 0), 0)  # ids of a token are distinct
        ids = tl.where(j == chosen, 2**62, ids)
        weight = tl.load(weights_ptr + token * top_k + chosen)
        term = tl.load(partial_ptr + (token * top_k + chosen) * width + c, mask=c < width, other=0.0)
        total = tl.fma(term, tl.broadcast_to(weight, term.shape), total)
    tl.store(out_ptr + token * width + c, total, mask=c < width)
