"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), expanded and absorbed.

Owns both forms and the choice between them. They are equal in exact arithmetic: the expanded form
restores keys and values of every head from the latents, the absorbed form moves the query into latent
space instead, so that a decoding step reads 576 values per past token and nothing else. Must not know
how weights are stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offload.config import LATENT_NORM_EPS, ModelConfig
from offload.kernels import AttentionLayer, Kernels
from offload.kernels.device import DeviceKernels
from offload.model.kv_cache import KVCache
from offload.quant import QuantizedTensor

EXPAND_FROM = 16
"""Tokens from which the first block of a context is computed in the expanded form.

There it takes less arithmetic: per head, query and key nope + rope + v = 320 products instead of
2 * R + rope = 1088, and the latents pass through kv_b_proj once in either form. Later blocks would have to
restore the whole context (160 KiB per token and layer of DeepSeek-V3) and outgrow any working memory set
aside at load, so they are absorbed. So are short blocks, which thus get the bits of the same tokens fed one
by one.
"""


@dataclass(frozen=True)
class AttentionWeights:
    """Weights of one layer. `q_a` and its norm are None when the model has a plain `q_proj` (in `q_b`)."""

    q_a: QuantizedTensor | None
    q_a_norm: Tensor | None
    q_b: QuantizedTensor
    kv_a: QuantizedTensor
    kv_a_norm: Tensor
    kv_b: QuantizedTensor
    o: QuantizedTensor


def attention_layer(weights: AttentionWeights, input_norm: Tensor, config: ModelConfig) -> AttentionLayer:
    """One layer as backends take it that compute the whole block."""
    return AttentionLayer(
        input_norm=input_norm,
        q_a=weights.q_a,
        q_a_norm=weights.q_a_norm,
        q_b=weights.q_b,
        kv_a=weights.kv_a,
        kv_a_norm=weights.kv_a_norm,
        kv_b=weights.kv_b,
        o=weights.o,
        eps=config.rms_norm_eps,
        latent_eps=LATENT_NORM_EPS,
        scale=config.softmax_scale,
        num_attention_heads=config.num_attention_heads,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
    )


def mla(
    x: Tensor,
    weights: AttentionWeights,
    layer: int,
    cache: KVCache,
    angles: tuple[Tensor, Tensor],
    config: ModelConfig,
    kernels: Kernels,
    absorbed: bool | None = None,
    first: int = 0,
) -> Tensor:
    """Attention output [T, H] for normed inputs x [T, H] at positions cache.length + first .. + T.

    Writes the layer's latents to `cache` without advancing it; `first` is the place of x in a longer pass whose
    earlier blocks have done so. `absorbed` forces a form.
    """
    tokens, start = x.shape[0], cache.length + first
    q_nope, q_rope = _queries(x, weights, angles, config, kernels)
    rows = cache.write(layer, _latents(x, weights, angles, config, kernels), first)  # [S, R+D]
    if absorbed is None:
        absorbed = start > 0 or tokens < EXPAND_FROM
    if absorbed:
        q_latent = kernels.absorb_query(q_nope, weights.kv_b)
        latent = kernels.mla_absorbed(q_latent, q_rope, rows, start, config.softmax_scale)
        heads = kernels.expand_value(latent, weights.kv_b, config.v_head_dim)
    else:
        k, v = _expand(rows, weights, config, kernels)
        heads = kernels.attend(torch.cat((q_nope, q_rope), -1), k, v, start, config.softmax_scale)
    return kernels.linear(heads.reshape(tokens, -1), weights.o)


def mla_at_position(
    x: Tensor,
    weights: AttentionWeights,
    rows: Tensor,
    at: tuple[Tensor, Tensor],
    angles: tuple[Tensor, Tensor],
    config: ModelConfig,
    kernels: DeviceKernels,
) -> Tensor:
    """`mla` of one token x [1, H] at a position that only the device knows: `at`, int64 [1] and the same as int32.

    Writes its latent to `rows` [capacity, R+D], the layer's part of a cache. Queues the same work for every position.
    """
    q_nope, q_rope = _queries(x, weights, angles, config, kernels)
    rows.index_copy_(0, at[0], _latents(x, weights, angles, config, kernels).to(rows.dtype))
    q_latent = kernels.absorb_query(q_nope, weights.kv_b)
    latent = kernels.mla_at(q_latent, q_rope, rows, at[1], rows.shape[0], config.softmax_scale)
    heads = kernels.expand_value(latent, weights.kv_b, config.v_head_dim)
    return kernels.linear(heads.reshape(1, -1), weights.o)


def _queries(
    x: Tensor, weights: AttentionWeights, angles: tuple[Tensor, Tensor], config: ModelConfig, kernels: Kernels
) -> tuple[Tensor, Tensor]:
    """q_nope [T, heads, nope] and rotated q_rope [T, heads, D]."""
    if weights.q_a is not None and weights.q_a_norm is not None:
        x = kernels.rms_norm(kernels.linear(x, weights.q_a), weights.q_a_norm, LATENT_NORM_EPS)
    q = kernels.linear(x, weights.q_b).view(x.shape[0], config.num_attention_heads, config.qk_head_dim)
    q_nope, q_rope = q.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
    return q_nope.contiguous(), kernels.rope(q_rope.contiguous(), *angles)


def _latents(
    x: Tensor, weights: AttentionWeights, angles: tuple[Tensor, Tensor], config: ModelConfig, kernels: Kernels
) -> Tensor:
    """What the cache keeps, [T, R+D]: the latent after its norm, the shared key after its rotation."""
    latent, k_rope = kernels.linear(x, weights.kv_a).split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
    latent = kernels.rms_norm(latent.contiguous(), weights.kv_a_norm, LATENT_NORM_EPS)
    k_rope = kernels.rope(k_rope.unsqueeze(1).contiguous(), *angles).squeeze(1)
    return torch.cat((latent, k_rope), dim=-1)


def _expand(rows: Tensor, weights: AttentionWeights, config: ModelConfig, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """Keys [S, heads, nope+D] and values [S, heads, v] of every cached token."""
    latent, k_rope = rows.float().split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
    kv = kernels.linear(latent.contiguous(), weights.kv_b)
    kv = kv.view(rows.shape[0], config.num_attention_heads, -1)
    k_nope, v = kv.split((config.qk_nope_head_dim, config.v_head_dim), dim=-1)
    k_rope = k_rope.unsqueeze(1).expand(-1, config.num_attention_heads, -1)
    return torch.cat((k_nope, k_rope), dim=-1), v.contiguous()
