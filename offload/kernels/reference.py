"""The reference backend: plain torch in fp32.

Owns the meaning of every kernel; other backends are tested against it. Weights are decoded exactly as
other engines decode them (rounded once to bf16) and multiplied in fp32. Expert and resident weights are
decoded for every call: slow, and needs no second copy in memory.

How a BLAS cuts a matrix product, and with it the last bits of every row, depends on the number of rows,
of threads and on the alignment of rows in memory; torch's vector functions treat the end of a tensor
differently from the rest. So everything runs on one torch thread (`select` sees to that), products in
blocks of fixed shape (rows in blocks of `ROWS`, cached tokens in blocks of `KEYS` counted from position
0, widths in multiples of `WIDTH`, all padded with zeros) and functions on whole vectors. Then a row's
bits depend on that row only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from offload.kernels.api import RouterShape, Wave
from offload.kernels.selection import choose_experts, weigh_experts
from offload.quant import QuantizedTensor

ROWS = 16
"""Rows per product. Fewer leave a long chunk slow, more make decoding pay for padding."""

KEYS = 256
"""Cached tokens per step of attention."""

WIDTH = 32
"""Floats of two vectors of AVX-512, which torch's vector functions take at once; what is left of a tensor is computed
one by one, with other last bits. They are two cache lines, too: rows of such a multiple are all aligned alike."""


class ReferenceKernels:
    """Kernels in torch. Works everywhere torch does."""

    name = "reference"

    def linear(self, x: Tensor, weight: QuantizedTensor) -> Tensor:
        return _product(x, weight.dequantize().float())

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    def swiglu_mlp(self, x: Tensor, gate: QuantizedTensor, up: QuantizedTensor, down: QuantizedTensor) -> Tensor:
        return self.linear(_map(silu, self.linear(x, gate)) * self.linear(x, up), down)

    def router(self, x: Tensor, weight: Tensor, bias: Tensor, shape: RouterShape) -> tuple[Tensor, Tensor]:
        scores = _map(torch.sigmoid, _product(x, weight.float()))  # [T, E]
        ids = choose_experts(scores, bias, shape)
        return ids, weigh_experts(scores, ids, shape)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        even, odd = x[..., 0::2], x[..., 1::2]
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)

    def absorb_query(self, q_nope: Tensor, kv_b: QuantizedTensor) -> Tensor:
        w_uk = _per_head(kv_b, q_nope.shape[1])[:, : q_nope.shape[2]]  # [heads, nope, R]
        return _products_per_head(q_nope, w_uk.transpose(1, 2))

    def expand_value(self, latent: Tensor, kv_b: QuantizedTensor, v_head_dim: int) -> Tensor:
        w_uv = _per_head(kv_b, latent.shape[1])[:, -v_head_dim:]  # [heads, v, R]
        return _products_per_head(latent, w_uv)

    def mla_absorbed(self, q_latent: Tensor, q_rope: Tensor, cache: Tensor, start: int, scale: float) -> Tensor:
        tokens, heads, rank = q_latent.shape
        queries = _widen(torch.cat((q_latent, q_rope), dim=-1))  # [T, heads, R+D]
        keys = _widen(cache[: start + tokens].float()).unsqueeze(0)  # [1, S, R+D]
        values = _widen(keys[..., :rank])
        out = torch.empty_like(q_latent)
        for t in range(tokens):  # all heads share the keys: the heads of one token are a block of rows
            last = torch.full((heads,), start + t, device=cache.device)
            out[t] = _attend(queries[t : t + 1], keys, values, last, scale)[0, :, :rank]
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, start: int, scale: float) -> Tensor:
        tokens = q.shape[0]
        queries = pad(_widen(q.transpose(0, 1)), (0, 0, 0, -tokens % ROWS))  # [heads, blocks * ROWS, Dq]
        keys, values = _widen(k.transpose(0, 1)), _widen(v.transpose(0, 1))
        blocks = []
        for first in range(0, tokens, ROWS):
            # Rows of padding see what the last token sees; nobody reads them.
            last = torch.arange(first, first + ROWS, device=q.device).clamp(max=tokens - 1) + start
            blocks.append(_attend(queries[:, first : first + ROWS], keys, values, last, scale))
        return torch.cat(blocks, dim=1)[:, :tokens, : v.shape[2]].transpose(0, 1).contiguous()

    def experts(self, x: Tensor, wave: Wave, k: int, partial: Tensor) -> None:
        for expert, positions in wave:
            rows = x[positions // k]
            partial[positions] = self.swiglu_mlp(rows, expert.gate_proj, expert.up_proj, expert.down_proj)

    def combine(self, partial: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = ids.argsort(1)  # ids of a token are distinct, so the order is unique
        terms = partial.view(*ids.shape, -1) * weights.unsqueeze(2)
        terms = terms.gather(1, order.unsqueeze(2).expand_as(terms))
        total = torch.zeros_like(terms[:, 0])
        for j in range(ids.shape[1]):
            total += terms[:, j]
        return total


def _widen(x: Tensor) -> Tensor:
    """x, contiguous, with zeros up to a multiple of WIDTH in the last dimension."""
    missing = -x.shape[-1] % WIDTH
    return pad(x, (0, missing)) if missing else x.contiguous()


def _map(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function` of every element of x [T, N]."""
    return function(_widen(x))[:, : x.shape[1]].contiguous()


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K] times the transposed weight [N, K]: [T, N]."""
    blocks = pad(_widen(x), (0, 0, 0, -x.shape[0] % ROWS)).split(ROWS)
    columns = _widen(weight).T
    return torch.cat([block @ columns for block in blocks])[: x.shape[0]]


def _per_head(kv_b: QuantizedTensor, heads: int) -> Tensor:
    """kv_b in fp32 as [heads, nope + v, R]."""
    return kv_b.dequantize().float().unflatten(0, (heads, -1))


def _products_per_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, heads, K] times the transposed weight [heads, N, K] of the same head: [T, heads, N]."""
    tokens = x.shape[0]
    blocks = pad(_widen(x), (0, 0, 0, 0, 0, -tokens % ROWS)).split(ROWS)
    columns = _widen(weight).transpose(1, 2)
    products = [torch.bmm(block.transpose(0, 1).contiguous(), columns) for block in blocks]
    return torch.cat(products, dim=1)[:, :tokens].transpose(0, 1).contiguous()


def _attend(q: Tensor, k: Tensor, v: Tensor, last: Tensor, scale: float) -> Tensor:
    """Softmax attention of a block: q [B, M, D], k [B, S, D], v [B, S, Dv]: [B, M, Dv].

    Row m sees keys 0..last[m]. Keys that a row does not see add exact zeros to it, so it does not matter
    how many of them follow.
    """
    total = int(last.max()) + 1
    scores, values = [], []
    for first in range(0, total, KEYS):
        keys = _whole_block(k[:, first:total])
        values.append(_whole_block(v[:, first:total]))
        hidden = torch.arange(first, first + KEYS, device=q.device) > last.unsqueeze(1)  # [M, KEYS]
        scores.append((torch.bmm(q, keys.transpose(1, 2)) * scale).masked_fill(hidden, -torch.inf))
    top = torch.stack([block.amax(-1, keepdim=True) for block in scores]).amax(0)
    out, weight = torch.zeros_like(q[..., :1]), torch.zeros_like(top)
    for block, value in zip(scores, values, strict=True):
        p = (block - top).exp()
        out = out + torch.bmm(p, value)
        weight = weight + p.sum(-1, keepdim=True)
    return out / weight


def _whole_block(rows: Tensor) -> Tensor:
    """The first KEYS of rows [B, S, D], zeros where there are fewer."""
    missing = KEYS - rows.shape[1]
    return pad(rows, (0, 0, 0, missing)) if missing > 0 else rows[:, :KEYS]
