"""The native CPU backend: kernels in C++ behind the kernels API.

Owns checking arguments. The GIL is released during every call. Must not know models, tiers or how the kernels work;
the library itself is opened in `native_library`, and told of weights in `native_descriptions`.

Integer formats (int8 and int4 in any group, int3 and int2 in groups of 32, nf4 in rows of whole blocks) quantise the
activations to int8 per group; the others decode their weights. Accumulation is fp32 throughout.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from ctypes import byref, c_int64, c_uint64
from typing import Any

import torch
from torch import Tensor

from offload.errors import KernelError
from offload.kernels import native_library
from offload.kernels.api import AttentionLayer, Block, Expert, ModelEnds, MoeLayer, MoeStart, RouterShape, Wave
from offload.kernels.native_descriptions import Descriptions, check_rows, router_weight
from offload.kernels.native_library import ISAS, Weight, describe_router, supported_isas
from offload.kernels.native_token import NativeToken, not_finite
from offload.quant import QuantizedTensor


def usable_cpus() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


MOST_THREADS = 1024
"""More than a machine has cores."""


class NativeKernels:
    """Kernels in C++ on `threads` threads (None: every core this process may use).

    `isa` forces an instruction set; every one gives the same bits. Raises KernelError when the library
    or the instruction set cannot be used, or the system does not start so many threads.
    """

    name = "native"

    def __init__(self, threads: int | None = None, isa: str = "auto") -> None:
        library = self._library = native_library.library()
        self.threads = usable_cpus() if threads is None else threads
        if not 1 <= self.threads <= MOST_THREADS:
            raise KernelError(f"kernels run on 1 to {MOST_THREADS} threads, not {threads}")
        if isa != "auto" and isa not in ISAS:
            raise KernelError(f"unknown instruction set {isa!r}; known: auto, {', '.join(ISAS)}")
        if isa != "auto" and isa not in supported_isas():
            raise KernelError(f"this processor does not run {isa}; it runs {', '.join(supported_isas())}")
        self._context = library.ep_create(isa.encode(), self.threads)
        if not self._context:
            raise KernelError(
                f"the system does not start {self.threads} threads (limits: ulimit -u, pids.max of the control group, "
                "memory for their stacks); give fewer, --threads 1 if need be"
            )
        # At exit the process ends with its threads; joining them then could hang after a fork.
        weakref.finalize(self, library.ep_destroy, self._context).atexit = False
        self.isa: str = library.ep_isa(self._context).decode()
        self._linear = native_library.linear()
        self._described = Descriptions()
        self._every: dict[int, Tensor] = {}  # positions 0..n-1 by n
        # Results are made as `tensor.new_empty(sizes)`: with code and data out of the processor's caches, as between
        # two weights, that takes half the time of `torch.empty` with a type.
        self._no_ids = torch.empty(0, dtype=torch.int64)
        self._routers: dict[tuple[RouterShape, int], Any] = {}

    def reserve(self, nbytes: int) -> int:
        """Grow the scratch memory to at least `nbytes` now; returns its size in bytes."""
        return int(self._library.ep_reserve(self._context, nbytes))

    def linear(self, x: Tensor, weight: QuantizedTensor) -> Tensor:
        pointer, described = self._described.weight(weight)
        tokens = check_rows(x, described.cols)
        out = x.new_empty(tokens, described.rows)
        bad = self._linear(self._context, pointer, x.data_ptr(), tokens, out.data_ptr())
        if bad:
            raise not_finite(bad)
        return out

    def swiglu_mlp(self, x: Tensor, gate: QuantizedTensor, up: QuantizedTensor, down: QuantizedTensor) -> Tensor:
        if gate.codec.name != up.codec.name:
            g, u = self.linear(x, gate), self.linear(x, up)
            h = torch.empty_like(g)
            self._library.ep_silu_mul(self._context, g.data_ptr(), u.data_ptr(), g.numel(), h.data_ptr())
            return self.linear(h, down)
        layout = (Weight * 3)(*(self._described.weight(w)[1] for w in (gate, up, down)))
        tokens = check_rows(x, gate.cols)
        out = x.new_empty(tokens, down.rows)
        positions = self._every.get(tokens)
        if positions is None:
            positions = self._every[tokens] = torch.arange(tokens)
        self._run_experts(layout, [0], [positions], x, 1, out)
        return out

    def experts(self, x: Tensor, wave: Wave, k: int, partial: Tensor) -> None:
        if not wave:
            return
        layout = self._described.of_expert(wave[0][0])
        if layout is None:  # matrices that are not views into one buffer
            for expert, positions in wave:
                alone = (Weight * 3)(*(self._described.weight(w)[1] for w in _matrices(expert)))
                self._run_experts(alone, [0], [positions], x, k, partial)
            return
        bases = [expert.buffer.data_ptr() for expert, _ in wave]
        self._run_experts(layout, bases, [positions for _, positions in wave], x, k, partial)

    def combine(self, partial: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        tokens, k = ids.shape
        hidden = partial.shape[1]
        check_rows(partial, hidden, tokens * k)
        check_rows(weights, k, tokens)
        out = partial.new_empty(tokens, hidden)
        pointers = partial.data_ptr(), _int64(ids).data_ptr(), weights.data_ptr()
        self._library.ep_combine(self._context, *pointers, tokens, k, hidden, out.data_ptr())
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        hidden = x.shape[-1]
        tokens = check_rows(x, hidden)
        check_rows(weight, hidden, 1)
        out = torch.empty_like(x)
        pointers = x.data_ptr(), weight.data_ptr()
        self._library.ep_rms_norm(self._context, *pointers, eps, tokens, hidden, out.data_ptr())
        return out

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        tokens, heads, dim = x.shape
        check_rows(x, dim)
        check_rows(cos, dim // 2, tokens)
        check_rows(sin, dim // 2, tokens)
        out = torch.empty_like(x)
        pointers = x.data_ptr(), cos.data_ptr(), sin.data_ptr()
        self._library.ep_rope(self._context, *pointers, tokens, heads, dim, out.data_ptr())
        return out

    def router(self, x: Tensor, weight: Tensor, bias: Tensor, shape: RouterShape) -> tuple[Tensor, Tensor]:
        experts, hidden = weight.shape
        tokens = check_rows(x, hidden)
        check_rows(bias, experts, 1)
        config = self._routers.get((shape, experts))
        if config is None:
            config = self._routers[shape, experts] = describe_router(shape, experts)
        ids = self._no_ids.new_empty(tokens, shape.num_experts_per_tok)
        weights = x.new_empty(tokens, shape.num_experts_per_tok)
        pointers = byref(router_weight(weight)), bias.data_ptr(), ids.data_ptr(), weights.data_ptr()
        bad = self._library.ep_router_topk(self._context, byref(config), x.data_ptr(), tokens, *pointers)
        if bad:
            raise not_finite(bad)
        return ids, weights

    def absorb_query(self, q_nope: Tensor, kv_b: QuantizedTensor) -> Tensor:
        tokens, heads, nope = q_nope.shape
        check_rows(q_nope, nope)
        pointer, described = self._described.weight(kv_b)
        value = described.rows // heads - nope
        out = q_nope.new_empty(tokens, heads, described.cols)
        shape = tokens, heads, nope, value
        bad = self._library.ep_absorb_query(self._context, pointer, q_nope.data_ptr(), *shape, out.data_ptr())
        if bad:
            raise not_finite(bad)
        return out

    def expand_value(self, latent: Tensor, kv_b: QuantizedTensor, v_head_dim: int) -> Tensor:
        tokens, heads, _ = latent.shape
        pointer, described = self._described.weight(kv_b)
        check_rows(latent, described.cols)
        out = latent.new_empty(tokens, heads, v_head_dim)
        shape = tokens, heads, v_head_dim
        bad = self._library.ep_expand_value(self._context, pointer, latent.data_ptr(), *shape, out.data_ptr())
        if bad:
            raise not_finite(bad)
        return out

    def mla_absorbed(self, q_latent: Tensor, q_rope: Tensor, cache: Tensor, start: int, scale: float) -> Tensor:
        tokens, heads, latent = q_latent.shape
        rope = q_rope.shape[2]
        check_rows(q_latent, latent)
        check_rows(q_rope, rope, tokens * heads)
        bf16 = cache.dtype == torch.bfloat16
        if not (bf16 or cache.dtype == torch.float32) or not cache.is_contiguous():
            raise KernelError(f"the latent cache must be contiguous float32 or bfloat16, not {cache.dtype}")
        if cache.shape[0] < start + tokens or cache.shape[1] != latent + rope:
            needed = (start + tokens, latent + rope)
            raise KernelError(f"the latent cache has shape {tuple(cache.shape)}, this call needs {needed}")
        out = torch.empty_like(q_latent)
        pointers = q_latent.data_ptr(), q_rope.data_ptr(), cache.data_ptr()
        shape = tokens, heads, latent, rope, start
        bad = self._library.ep_mla_absorbed(self._context, *pointers, int(bf16), *shape, scale, out.data_ptr())
        if bad:
            raise not_finite(bad)
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, start: int, scale: float) -> Tensor:
        tokens, heads, key_dim = q.shape
        value_dim = v.shape[2]
        check_rows(q, key_dim)
        check_rows(k, key_dim, (start + tokens) * heads)
        check_rows(v, value_dim, (start + tokens) * heads)
        out = q.new_empty(tokens, heads, value_dim)
        pointers = q.data_ptr(), k.data_ptr(), v.data_ptr()
        shape = tokens, heads, key_dim, value_dim, start
        bad = self._library.ep_attend(self._context, *pointers, *shape, scale, out.data_ptr())
        if bad:
            raise not_finite(bad)
        return out

    def attention(
        self, layer: AttentionLayer, hidden: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, start: int
    ) -> Tensor:
        tokens, width = hidden.shape[0], layer.kv_b.cols + layer.qk_rope_head_dim
        check_rows(hidden, layer.kv_a.cols)
        check_rows(cos, layer.qk_rope_head_dim // 2, tokens)
        check_rows(sin, layer.qk_rope_head_dim // 2, tokens)
        if check_rows(cache, width) < start + tokens:
            raise KernelError(f"the latent cache has {cache.shape[0]} rows, this call needs {start + tokens}")
        out = torch.empty_like(hidden)
        pointers = hidden.data_ptr(), cos.data_ptr(), sin.data_ptr()
        described = byref(self._described.attention(layer))
        bad = self._library.ep_attention(
            self._context, described, *pointers, tokens, start, cache.data_ptr(), out.data_ptr()
        )
        if bad:
            raise not_finite(bad)
        return out

    def begin_moe(self, layer: MoeLayer, hidden: Tensor) -> MoeStart:
        tokens, k = check_rows(hidden, layer.router.shape[1]), layer.shape.num_experts_per_tok
        x = torch.empty_like(hidden)
        ids = self._no_ids.new_empty(tokens, k)
        weights = hidden.new_empty(tokens, k)
        token = c_uint64()
        results = x.data_ptr(), ids.data_ptr(), weights.data_ptr(), byref(token)
        described = byref(self._described.block(layer))
        bad = self._library.ep_moe_begin(self._context, described, hidden.data_ptr(), tokens, *results)
        if bad:
            raise not_finite(bad)
        return MoeStart(x, ids, weights, token.value)

    def end_moe(self, layer: MoeLayer, hidden: Tensor, start: MoeStart, routed: Tensor) -> Tensor:
        tokens = check_rows(hidden, layer.router.shape[1])
        check_rows(routed, hidden.shape[1], tokens)
        out = torch.empty_like(hidden)
        pointers = hidden.data_ptr(), start.x.data_ptr(), routed.data_ptr()
        described = byref(self._described.block(layer))
        bad = self._library.ep_moe_end(self._context, described, *pointers, tokens, start.token, out.data_ptr())
        if bad:
            raise not_finite(bad)
        return out

    def one_token(self, attention: Sequence[AttentionLayer], blocks: Sequence[Block], ends: ModelEnds) -> NativeToken:
        first = attention[0]
        moe = [block for block in blocks if isinstance(block, MoeLayer)]
        described = [self._described.block(block) for block in blocks]
        widths = {block.router.cols for block in described} | {layer.kv_a.cols for layer in attention}
        widths |= {ends.embed.cols, ends.head.cols}
        latents = {layer.kv_b.cols + layer.qk_rope_head_dim for layer in attention}
        counts = {block.shape.num_experts_per_tok for block in moe}
        if len(widths) != 1 or len(latents) != 1 or len(counts) > 1:
            raise KernelError(f"layers of one model differ: {widths} wide, latents of {latents}, top {counts}")
        return NativeToken(
            self._library,
            self._context,
            [self._described.attention(layer) for layer in attention],
            described,
            self._described.ends(ends),
            (widths.pop(), latents.pop(), first.qk_rope_head_dim // 2, counts.pop() if counts else 1),
            self._described.layout,
        )

    def read(self, data: Tensor) -> int:
        """Touch every byte of `data` on all threads: the bandwidth that kernels are measured against."""
        return int(self._library.ep_read(self._context, data.data_ptr(), data.nbytes))

    def _run_experts(
        self, layout: Any, bases: list[int], positions: list[Tensor], x: Tensor, k: int, out: Tensor
    ) -> None:
        tokens = check_rows(x, layout[0].cols)
        check_rows(out, layout[2].rows, tokens * k)
        n = len(bases)
        positions = [_int64(p) for p in positions]
        addresses = (c_uint64 * n)(*bases)
        lists = (c_uint64 * n)(*(p.data_ptr() for p in positions))
        counts = (c_int64 * n)(*(p.numel() for p in positions))
        bad = self._library.ep_experts(
            self._context, layout, addresses, lists, counts, n, x.data_ptr(), tokens, k, out.data_ptr()
        )
        if bad < 0:
            raise KernelError(f"a position lies outside the {tokens * k} of this call")
        if bad:
            raise not_finite(bad)


def _matrices(expert: Expert) -> tuple[QuantizedTensor, QuantizedTensor, QuantizedTensor]:
    return expert.gate_proj, expert.up_proj, expert.down_proj


def _int64(x: Tensor) -> Tensor:
    return x if x.dtype is torch.int64 and x.is_contiguous() else x.to(torch.int64).contiguous()
