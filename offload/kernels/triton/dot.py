"""The tensor-core product that all kernels use: bf16 factors, fp32 sums, never fp16.

Owns one exception. Triton's interpreter, in which kernels are tested without a GPU, cuts fp32 to bf16
without rounding and multiplies the bits of bf16 as if they were integers. There the factors are rounded as
the hardware rounds and widened before they meet.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc):
    """acc + a [M, K] times b [K, N], both bf16."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def bf16(x):
    """fp32 x rounded to the nearest bf16, ties to even."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return x.to(tl.bfloat16)
