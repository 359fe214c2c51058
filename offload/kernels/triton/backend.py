"""The Triton backend: `DeviceKernels` for CUDA tensors.

Owns the checks of arguments and the order of launches. Work is queued on the current stream and nothing
waits for it, so a value that is not finite is not noticed here; it shows in the logits.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from offload.errors import KernelError
from offload.kernels.api import RouterShape, Wave
from offload.kernels.device import (
    FEW_TOKENS,
    GPU_LATENT_DTYPE,
    LATENT_SPLIT,
    ExpertSlab,
    Groups,
    SlabLayout,
    check_alignment,
    latent_scratch_nbytes,
)
from offload.kernels.triton import attend, experts, linear, mla, route, small
from offload.kernels.triton.formats import Packed
from offload.kernels.triton.launch import Launcher, start
from offload.quant import QuantizedTensor
from offload.types import ceil_div

HEADS = 16
"""Heads per program of latent attention. With 32, the cache is read half as often and registers spill."""


class TritonKernels:
    """Kernels in Triton. `launch` stands in for the device in tools and tests."""

    name = "triton"
    latent_dtype = GPU_LATENT_DTYPE
    uses_blas = False
    pass_lengths: tuple[int, ...] = (FEW_TOKENS, 16, 64, 512, 2048)

    def __init__(self, launch: Launcher = start) -> None:
        self._launch = launch
        self._weights: dict[int, tuple[weakref.ref[QuantizedTensor], Packed]] = {}

    def linear(self, x: Tensor, weight: QuantizedTensor) -> Tensor:
        _check(x, weight.cols)
        return linear.product(self._launch, x, self._packed(weight))

    def swiglu_mlp(self, x: Tensor, gate: QuantizedTensor, up: QuantizedTensor, down: QuantizedTensor) -> Tensor:
        _check(x, gate.cols)
        g, u, d = self._packed(gate), self._packed(up), self._packed(down)
        if x.shape[0] <= FEW_TOKENS and g.format == u.format == d.format and g.rows == d.cols:
            return linear.mlp(self._launch, x, g, u, d)
        h = torch.nn.functional.silu(linear.product(self._launch, x, g)) * linear.product(self._launch, x, u)
        return linear.product(self._launch, h, d)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        width = x.shape[-1]
        _check(x, width)
        _check(weight, width)
        out = torch.empty_like(x)
        block = _power_of_two(width)
        warps = max(1, min(8, block // 512))
        self._launch(
            small.rms_norm_kernel, (x.numel() // width,), x, weight, out, width, eps, WIDTH=block, num_warps=warps
        )
        return out

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        tokens, heads, dim = x.shape
        _check(x, dim)
        for table in (cos, sin):
            _check(table, dim // 2)
        out = torch.empty_like(x)
        half = _power_of_two(dim // 2)
        self._launch(small.rope_kernel, (tokens * heads,), x, cos, sin, out, heads, dim // 2, HALF=half, num_warps=1)
        return out

    def router(self, x: Tensor, weight: Tensor, bias: Tensor, shape: RouterShape) -> tuple[Tensor, Tensor]:
        tokens, hidden = x.shape
        count = weight.shape[0]
        _check(x, weight.shape[1])
        _check(bias, count)
        splits = ceil_div(hidden, route.SPLIT)
        parts = torch.empty((splits, tokens, count), dtype=torch.float32, device=x.device)
        if tokens <= FEW_TOKENS:
            self._launch(
                route.logits_kernel, (tokens, ceil_div(count, 8), splits), x, weight, parts, tokens, count, hidden,
                SPLIT=route.SPLIT, E=8, K=512, num_warps=4,
            )  # fmt: skip
        else:
            self._launch(
                route.logit_tiles_kernel, (ceil_div(tokens, 16), ceil_div(count, 32), splits),
                x, weight, parts, tokens, count, hidden, SPLIT=route.SPLIT, T=16, E=32, K=64, num_warps=4,
            )  # fmt: skip
        ids = torch.empty((tokens, shape.num_experts_per_tok), dtype=torch.int64, device=x.device)
        weights = torch.empty(ids.shape, dtype=torch.float32, device=x.device)
        group = count // shape.n_group
        self._launch(
            route.choose_kernel, (tokens,), parts, bias, ids, weights, tokens, splits, count, group,
            shape.routed_scaling_factor,
            n_group=shape.n_group, topk_group=shape.topk_group, top_k=shape.num_experts_per_tok,
            NORM=shape.norm_topk_prob, G=_power_of_two(shape.n_group), S=_power_of_two(group),
            K=_power_of_two(shape.num_experts_per_tok), num_warps=1,
        )  # fmt: skip
        return ids, weights

    def absorb_query(self, q_nope: Tensor, kv_b: QuantizedTensor) -> Tensor:
        _check(q_nope, q_nope.shape[-1])
        return linear.into_latent(self._launch, q_nope, self._packed(kv_b))[..., : kv_b.cols]

    def expand_value(self, latent: Tensor, kv_b: QuantizedTensor, v_head_dim: int) -> Tensor:
        _check(latent, kv_b.cols)
        heads = latent.shape[1]
        rows = kv_b.rows // heads
        return linear.product(self._launch, latent, self._packed(kv_b), heads, rows, rows - v_head_dim)

    def mla_absorbed(self, q_latent: Tensor, q_rope: Tensor, cache: Tensor, start: int, scale: float) -> Tensor:
        at = torch.full((1,), start, dtype=torch.int32, device=cache.device)
        return self.mla_at(q_latent, q_rope, cache, at, start + q_latent.shape[0], scale)

    def scratch_nbytes(self, tokens: int, heads: int, rank: int, limit: int) -> int:
        return latent_scratch_nbytes(tokens, heads, rank, limit)

    def mla_at(
        self, q_latent: Tensor, q_rope: Tensor, cache: Tensor, start: Tensor, limit: int, scale: float
    ) -> Tensor:
        tokens, heads, rank = q_latent.shape
        rope = q_rope.shape[2]
        _check(q_latent, rank)
        _check(q_rope, rope)
        if cache.shape[0] < limit or cache.shape[1] != rank + rope or not cache.is_contiguous():
            raise KernelError(
                f"the latent cache has shape {tuple(cache.shape)}, this call needs {(limit, rank + rope)}, contiguous"
            )
        out = torch.empty_like(q_latent)
        few = tokens <= FEW_TOKENS
        splits = ceil_div(limit, LATENT_SPLIT) if few else 1
        acc, top, total = out, out, out  # one split writes its result at once
        if splits > 1:
            acc = torch.empty((tokens, heads, splits, rank), dtype=torch.float32, device=out.device)
            top = torch.empty((2, tokens, heads, splits), dtype=torch.float32, device=out.device)
            top, total = top
        self._launch(
            mla.mla_split_kernel, (ceil_div(heads, HEADS), splits, tokens),
            q_latent, q_rope, cache, start, acc, top, total, heads, rank, rope, scale, splits,
            SPLIT=LATENT_SPLIT if few else 1 << 30, ALONE=splits == 1, H=HEADS, S=64,
            R=max(_power_of_two(rank), 16), D=max(_power_of_two(rope), 16), num_warps=4, num_stages=2,
        )  # fmt: skip
        if splits > 1:
            self._launch(
                mla.mla_join_kernel, (heads, tokens), acc, top, total, start, out, heads, rank, splits,
                SPLIT=LATENT_SPLIT, R=_power_of_two(rank), num_warps=4,
            )  # fmt: skip
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, start: int, scale: float) -> Tensor:
        tokens, heads, key_dim = q.shape
        value_dim = v.shape[2]
        _check(q, key_dim)
        _check(k, key_dim)
        _check(v, value_dim)
        out = torch.empty((tokens, heads, value_dim), dtype=torch.float32, device=q.device)
        self._launch(
            attend.attend_kernel, (ceil_div(tokens, 64), heads), q, k, v, out, start, tokens, heads,
            key_dim, value_dim, scale, M=64, S=32, D=max(_power_of_two(key_dim), 16),
            V=max(_power_of_two(value_dim), 16), num_warps=4, num_stages=2,
        )  # fmt: skip
        return out

    def experts(self, x: Tensor, wave: Wave, k: int, partial: Tensor) -> None:
        for expert, positions in wave:
            rows = x[torch.div(positions, k, rounding_mode="floor")]
            partial[positions] = self.swiglu_mlp(rows, expert.gate_proj, expert.up_proj, expert.down_proj)

    def check_experts(self, layout: SlabLayout) -> None:
        check_alignment(layout)
        experts.positions_of(layout)

    def slot_experts(self, slab: ExpertSlab, x: Tensor, slots: Tensor, partial: Tensor) -> None:
        hidden = slab.layout.hidden_size
        _check(x, hidden)
        _check(partial, hidden)
        if slots.dtype != torch.int32 or slots.numel() % x.shape[0] or partial.shape[0] < slots.numel():
            raise KernelError(
                f"{slots.numel()} {slots.dtype} slots and {partial.shape[0]} rows of results do not go with "
                f"{x.shape[0]} tokens; slots are int32 [T * K]"
            )
        experts.slab_experts(self._launch, slab, x, slots, partial)

    def tile_rows(self, layout: SlabLayout, tokens: int) -> int:
        return experts.group_tile(experts.positions_of(layout).up, tokens)["M"]

    def group_input(self, layout: SlabLayout, x: Tensor) -> Tensor:
        _check(x, layout.hidden_size)
        return linear.activations(x, experts.positions_of(layout).up)[0]

    def group_experts(self, slab: ExpertSlab, inputs: Tensor, groups: Groups, partial: Tensor) -> None:
        _check(partial, slab.layout.hidden_size)
        if groups.order.numel() % inputs.shape[0] or partial.shape[0] < groups.order.numel():
            raise KernelError(
                f"{groups.order.numel()} positions and {partial.shape[0]} rows of results do not go with "
                f"{inputs.shape[0]} tokens"
            )
        experts.grouped_experts(self._launch, slab, inputs, groups, partial)

    def combine(self, partial: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        tokens, k = ids.shape
        width = partial.shape[1]
        _check(partial, width)
        _check(weights, k)
        out = torch.empty((tokens, width), dtype=torch.float32, device=partial.device)
        self._launch(
            small.combine_kernel, (tokens, ceil_div(width, 512)), partial, ids.contiguous(), weights, out, k, width,
            K=_power_of_two(k), WIDTH=512, num_warps=4,
        )  # fmt: skip
        return out

    def _packed(self, weight: QuantizedTensor) -> Packed:
        key = id(weight)
        known = self._weights.get(key)
        if known is None:
            form = linear.packed(weight)
            if form.payload.data_ptr() != next(iter(weight.parts.values())).data_ptr():
                return form  # decoded for this call: not kept, or it would be a second copy in memory
            forget = weakref.ref(weight, lambda _: self._weights.pop(key, None))
            known = self._weights[key] = (forget, form)
        return known[1]


def _check(x: Tensor, width: int) -> None:
    """Kernels read float32 rows of `width`, contiguous."""
    if x.dtype != torch.float32 or not x.is_contiguous() or x.shape[-1] != width:
        raise KernelError(
            f"a kernel needs contiguous float32 rows of {width} values, not {x.dtype} of shape {tuple(x.shape)} "
            f"with strides {x.stride()}"
        )


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
