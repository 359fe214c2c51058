"""Ordinary causal attention for the first chunk of a context: online softmax over blocks of keys.

Owns one kernel. A query's bits depend on its own position and the keys before it: blocks that it does not
see add exact zeros, and blocks are counted from position 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from offload.kernels.triton.dot import bf16, dot
from offload.kernels.triton.mla import LOG2E


@triton.jit(do_not_specialize=["start", "tokens"])
def attend_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, start, tokens, heads, key_dim, value_dim, scale,
    M: tl.constexpr, S: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """A block of M queries of one head; q [T, heads, key_dim], k and v [S, heads, ..]."""
    block, head = tl.program_id(0), tl.program_id(1)
    t = block * M + tl.arange(0, M)
    d, c = tl.arange(0, D), tl.arange(0, V)
    row = (t.to(tl.int64) * heads + head)[:, None]
    mask = (t < tokens)[:, None] & (d < key_dim)[None, :]
    q = tl.load(q_ptr + row * key_dim + d[None, :], mask=mask, other=0.0)
    q = bf16(q)
    acc = tl.zeros((M, V), tl.float32)
    top = tl.full((M,), float("-inf"), tl.float32)
    weight = tl.zeros((M,), tl.float32)
    total = start + tl.minimum((block + 1) * M, tokens)
    for first in tl.range(0, total, S):
        s = first + tl.arange(0, S)
        there = s < total
        at = (s.to(tl.int64) * heads + head)[:, None]
        k = tl.load(k_ptr + at * key_dim + d[None, :], mask=there[:, None] & (d < key_dim)[None, :], other=0.0)
        v = tl.load(v_ptr + at * value_dim + c[None, :], mask=there[:, None] & (c < value_dim)[None, :], other=0.0)
        score = dot(q, tl.trans(bf16(k)), tl.zeros((M, S), tl.float32)) * (scale * LOG2E)
        score = tl.where(s[None, :] <= start + t[:, None], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))  # finite: every query sees row 0, in the first block
        p = tl.exp2(score - new_top[:, None])
        fade = tl.exp2(top - new_top)
        weight = weight * fade + tl.sum(p, 1)
        acc = dot(bf16(p), bf16(v), acc * fade[:, None])
        top = new_top
    mask = (t < tokens)[:, None] & (c < value_dim)[None, :]
    tl.store(out_ptr + row * value_dim + c[None, :], acc / weight[:, None], mask=mask)
