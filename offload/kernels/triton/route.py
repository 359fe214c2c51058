"""The noaux_tc router: logits in fp32, then the choice of experts, two launches.

Owns the order in which a logit is summed (the hidden size in `SPLIT` columns per program, the parts added in
order) and the choice: groups by the sum of their two best biased scores, then the best experts of the
kept groups, ties to the lower index; the bias chooses and does not weigh.
"""

from __future__ import annotations

import triton
import triton.language as tl

SPLIT = 1024


@triton.jit(do_not_specialize=["tokens"])
def logits_kernel(
    x_ptr, weight_ptr, parts_ptr, tokens, experts, hidden, SPLIT: tl.constexpr, E: tl.constexpr, K: tl.constexpr
):
    """parts[s, t, e] = weight[e] . x[t] over the s-th SPLIT columns, for one token and a block of E experts."""
    token, split = tl.program_id(0), tl.program_id(2)
    e = tl.program_id(1) * E + tl.arange(0, E)
    acc = tl.zeros((E, K), tl.float32)
    for k in tl.static_range(0, SPLIT, K):
        c = split * SPLIT + k + tl.arange(0, K)
        mask = (e < experts)[:, None] & (c < hidden)[None, :]
        w = tl.load(weight_ptr + e[:, None] * hidden + c[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + token * hidden + c, mask=c < hidden, other=0.0)
        acc = tl.fma(w, tl.broadcast_to(x[None, :], w.shape), acc)
    tl.store(parts_ptr + (split * tokens + token) * experts + e, tl.sum(acc, 1), mask=e < experts)


@triton.jit(do_not_specialize=["tokens"])
def logit_tiles_kernel(
    x_ptr, weight_ptr, parts_ptr, tokens, experts, hidden,
    SPLIT: tl.constexpr, T: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The same for a tile of tokens and experts, in fp32 without rounding of the factors."""
    t = tl.program_id(0) * T + tl.arange(0, T)
    e = tl.program_id(1) * E + tl.arange(0, E)
    split = tl.program_id(2)
    acc = tl.zeros((T, E), tl.float32)
    for k in tl.range(0, SPLIT, K):
        c = split * SPLIT + k + tl.arange(0, K)
        mask = (e < experts)[:, None] & (c < hidden)[None, :]
        w = tl.load(weight_ptr + e[:, None] * hidden + c[None, :], mask=mask, other=0.0).to(tl.float32)
        mask = (t < tokens)[:, None] & (c < hidden)[None, :]
        x = tl.load(x_ptr + t[:, None] * hidden + c[None, :], mask=mask, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    at = parts_ptr + (split * tokens + t)[:, None] * experts + e[None, :]
    tl.store(at, acc, mask=(t < tokens)[:, None] & (e < experts)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def choose_kernel(
    parts_ptr, bias_ptr, ids_ptr, weights_ptr, tokens, splits, experts, group_size, scaling,
    n_group: tl.constexpr, topk_group: tl.constexpr, top_k: tl.constexpr, NORM: tl.constexpr,
    G: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """ids and weights of one token, best first. G x S is the padded grid of groups and experts of a group."""
    token = tl.program_id(0)
    g, s = tl.arange(0, G), tl.arange(0, S)
    e = g[:, None] * group_size + s[None, :]  # [G, S]
    there = (g < n_group)[:, None] & (s < group_size)[None, :]
    logit = tl.zeros((G, S), tl.float32)
    for split in range(splits):
        logit += tl.load(parts_ptr + (split * tokens + token) * experts + e, mask=there, other=0.0)
    score = 1.0 / (1.0 + tl.exp(-logit))
    # -inf, not 0: a kept expert may have a negative biased score.
    choice = tl.where(there, score + tl.load(bias_ptr + e, mask=there, other=0.0), float("-inf"))
    if n_group > 1:
        best = tl.max(choice, 1)
        second = tl.max(tl.where(s[None, :] == tl.argmax(choice, 1)[:, None], float("-inf"), choice), 1)
        rating = tl.where(g < n_group, best + second, float("-inf"))
        kept = tl.zeros((G,), tl.int32)
        for _ in tl.static_range(topk_group):
            # Chosen and missing groups are below every other, even where all ratings are -inf.
            top = tl.argmax(rating, 0)
            kept = tl.where(g == top, 1, kept)
            rating = tl.where(g == top, float("-inf"), rating)
        choice = tl.where(kept[:, None] > 0, choice, float("-inf"))
    order, gathered = tl.zeros((K,), tl.int32), tl.zeros((K,), tl.float32)
    j = tl.arange(0, K)
    for rank in tl.static_range(top_k):
        row_best = tl.max(choice, 1)
        group = tl.argmax(row_best, 0)
        row = tl.where((g == group)[:, None], choice, float("-inf"))
        member = tl.argmax(tl.max(row, 0), 0)
        chosen = (g == group)[:, None] & (s == member)[None, :]
        weight = tl.sum(tl.sum(tl.where(chosen, score, 0.0), 1), 0)
        order = tl.where(j == rank, group * group_size + member, order)
        gathered = tl.where(j == rank, weight, gathered)
        choice = tl.where(chosen, float("-inf"), choice)
    if NORM:
        gathered = gathered / (tl.sum(gathered, 0) + 1e-20)
    tl.store(ids_ptr + token * top_k + j, order.to(tl.int64), mask=j < top_k)
    tl.store(weights_ptr + token * top_k + j, gathered * scaling, mask=j < top_k)
