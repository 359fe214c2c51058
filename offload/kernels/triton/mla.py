"""Attention over the latent cache, queries in latent space: split over past tokens, then joined in order.

Owns the split (every program takes `SPLIT` past tokens, counted from position 0, and the heads of one query)
and the join. What a query sees and the order of its sums depend on its own position only. Queries, latents
and probabilities meet as bf16 on tensor cores, scores and sums are fp32.

The position of the first query is read on the device. Programs whose tokens lie behind their query return
at once, so that one launch serves every position up to its limit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from offload.kernels.triton.dot import bf16, dot

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def mla_split_kernel(
    q_ptr,
    q_rope_ptr,
    cache_ptr,
    start_ptr,
    acc_ptr,  # fp32 [T, heads, splits, rank]
    top_ptr,  # fp32 [T, heads, splits]: largest score, base 2
    sum_ptr,  # fp32 [T, heads, splits]
    heads,
    rank,
    rope,
    scale,
    splits,
    SPLIT: tl.constexpr,
    ALONE: tl.constexpr,  # the only split: acc_ptr is the result
    H: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
):
    """One query's heads against one split."""
    split, token = tl.program_id(1), tl.program_id(2)
    length = tl.load(start_ptr) + token + 1  # rows that this query sees
    if split * SPLIT >= length:
        return
    h = tl.program_id(0) * H + tl.arange(0, H)
    r, d = tl.arange(0, R), tl.arange(0, D)
    h_mask = h < heads
    row = (token * heads + h)[:, None]
    q = tl.load(q_ptr + row * rank + r[None, :], mask=h_mask[:, None] & (r < rank)[None, :], other=0.0)
    q_rope = tl.load(q_rope_ptr + row * rope + d[None, :], mask=h_mask[:, None] & (d < rope)[None, :], other=0.0)
    q, q_rope = bf16(q), bf16(q_rope)
    acc = tl.zeros((H, R), tl.float32)
    top = tl.full((H,), float("-inf"), tl.float32)
    weight = tl.zeros((H,), tl.float32)
    width = rank + rope
    for first in tl.range(split * SPLIT, tl.minimum((split + 1) * SPLIT, length), S):
        s = first + tl.arange(0, S)
        seen = s < length
        at = cache_ptr + s.to(tl.int64)[:, None] * width
        latent = tl.load(at + r[None, :], mask=seen[:, None] & (r < rank)[None, :], other=0.0)
        key = tl.load(at + rank + d[None, :], mask=seen[:, None] & (d < rope)[None, :], other=0.0)
        if latent.dtype != tl.bfloat16:
            latent, key = bf16(latent), bf16(key)
        score = dot(q, tl.trans(latent), tl.zeros((H, S), tl.float32))
        score = dot(q_rope, tl.trans(key), score) * (scale * LOG2E)
        score = tl.where(seen[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))  # finite: a block begins with a row that is seen
        p = tl.exp2(score - new_top[:, None])
        fade = tl.exp2(top - new_top)
        weight = weight * fade + tl.sum(p, 1)
        acc = dot(bf16(p), latent, acc * fade[:, None])
        top = new_top
    mask = h_mask[:, None] & (r < rank)[None, :]
    if ALONE:
        tl.store(acc_ptr + row * rank + r[None, :], acc / weight[:, None], mask=mask)
    else:
        part = (token * heads + h) * splits + split
        tl.store(acc_ptr + part.to(tl.int64)[:, None] * rank + r[None, :], acc, mask=mask)
        tl.store(top_ptr + part, top, mask=h_mask)
        tl.store(sum_ptr + part, weight, mask=h_mask)


@triton.jit
def mla_join_kernel(
    acc_ptr, top_ptr, sum_ptr, start_ptr, out_ptr, heads, rank, splits, SPLIT: tl.constexpr, R: tl.constexpr
):
    """The splits of one query and head, joined in ascending order."""
    head, token = tl.program_id(0), tl.program_id(1)
    length = tl.load(start_ptr) + token + 1
    used = tl.cdiv(length, SPLIT)
    r = tl.arange(0, R)
    row = token * heads + head
    acc = tl.zeros((R,), tl.float32)
    weight, top = 0.0, float("-inf")
    for split in range(used):
        part = row * splits + split
        split_top = tl.load(top_ptr + part)
        new_top = tl.maximum(top, split_top)
        fade, gain = tl.exp2(top - new_top), tl.exp2(split_top - new_top)
        value = tl.load(acc_ptr + part.to(tl.int64) * rank + r, mask=r < rank, other=0.0)
        acc = acc * fade + value * gain
        weight = weight * fade + tl.load(sum_ptr + part) * gain
        top = new_top
    tl.store(out_ptr + row * rank + r, acc / weight, mask=r < rank)
