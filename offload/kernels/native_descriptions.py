"""What the native library has been told of weights and layers, each once.

Owns descriptions and what keeps their addresses valid: a resident weight's lasts as long as the weight, a layer is
held. Experts lie wherever a slot is, so that theirs is of their layout, and the address comes with every call. Must
not know tensors that are computed with.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from ctypes import addressof
from typing import Any

import torch
from torch import Tensor

from offload.errors import KernelError
from offload.kernels.api import AttentionLayer, Block, DenseLayer, Expert, ModelEnds, MoeLayer
from offload.kernels.native_library import BF16, F32, Attention, Moe, Weight, describe, describe_router
from offload.kernels.native_token import Ends
from offload.quant import QuantizedTensor
from offload.types import PROJECTIONS


class Descriptions:
    """By identity: looking one up takes less time than a small product's dispatch."""

    def __init__(self) -> None:
        self._weights: dict[int, tuple[weakref.ref[QuantizedTensor], int, Weight]] = {}
        self._layouts: dict[int, tuple[Any, Any]] = {}
        self._attentions: dict[int, tuple[AttentionLayer, Attention]] = {}
        self._blocks: dict[int, tuple[Block, Moe]] = {}
        self._ends: list[ModelEnds] = []

    def weight(self, weight: QuantizedTensor) -> tuple[int, Weight]:
        """The address of the description of `weight`, and the description."""
        key = id(weight)
        known = self._weights.get(key)
        if known is None:
            for suffix, part in weight.parts.items():
                if not part.is_contiguous():
                    raise KernelError(f"{suffix} of a {weight.codec.name} weight is not contiguous")
            addresses = {suffix: part.data_ptr() for suffix, part in weight.parts.items()}
            described = describe(weight.codec, (weight.rows, weight.cols), addresses)
            weights = self._weights

            def forget(_: object) -> None:
                weights.pop(key, None)

            known = weights[key] = (weakref.ref(weight, forget), addressof(described), described)
        return known[1], known[2]

    def of_expert(self, expert: Expert) -> Any:
        """gate, up and down of a store's experts with offsets in place of addresses; None for matrices that are not
        views into one buffer."""
        layout = getattr(expert, "layout", None)
        return None if layout is None else self.layout(layout)

    def layout(self, layout: Any) -> Any:
        """gate, up and down of the experts of `layout`, with offsets in place of addresses."""
        known = self._layouts.get(id(layout))
        if known is None:
            offsets = {(f.projection, f.suffix): f.offset for f in layout.fields}
            described = (Weight * 3)()
            for index, projection in enumerate(PROJECTIONS):
                parts = {suffix: at for (owner, suffix), at in offsets.items() if owner == projection}
                described[index] = describe(layout.codec, layout.shape(projection), parts)
            known = self._layouts[id(layout)] = (layout, described)  # holding it keeps its id taken
        return known[1]

    def attention(self, layer: AttentionLayer) -> Attention:
        """The description of `layer`."""
        known = self._attentions.get(id(layer))
        if known is None:  # holding the layer keeps its id taken
            known = self._attentions[id(layer)] = (layer, self._describe_attention(layer))
        return known[1]

    def block(self, layer: Block) -> Moe:
        """The description of `layer`."""
        known = self._blocks.get(id(layer))
        if known is None:
            described = self._describe_dense(layer) if isinstance(layer, DenseLayer) else self._describe_moe(layer)
            known = self._blocks[id(layer)] = (layer, described)
        return known[1]

    def ends(self, ends: ModelEnds) -> Ends:
        """The description of `ends`, which are held as layers are: workers may be at a head that nobody waits for."""
        if (ends.embed.rows, ends.embed.cols) != (ends.head.rows, ends.head.cols):
            shapes = [f"{weight.rows} x {weight.cols}" for weight in (ends.embed, ends.head)]
            raise KernelError(f"the embedding is {shapes[0]}, the head {shapes[1]}")
        check_rows(ends.norm, ends.head.cols, 1)
        self._ends.append(ends)
        embed, head = self.weight(ends.embed)[0], self.weight(ends.head)[0]
        return Ends(embed, head, ends.norm.data_ptr(), ends.eps, ends.head.rows)

    def _describe_attention(self, layer: AttentionLayer) -> Attention:
        heads, value = layer.num_attention_heads, layer.v_head_dim
        query = layer.qk_nope_head_dim + layer.qk_rope_head_dim
        hidden, low = layer.kv_a.cols, layer.kv_a.cols if layer.q_a is None else layer.q_a.rows
        latent = layer.kv_b.cols
        expected = {
            "q_b": (layer.q_b, heads * query, low),
            "kv_a": (layer.kv_a, latent + layer.qk_rope_head_dim, hidden),
            "kv_b": (layer.kv_b, heads * (layer.qk_nope_head_dim + value), latent),
            "o": (layer.o, hidden, heads * value),
        }
        if layer.q_a is not None:
            expected["q_a"] = (layer.q_a, low, hidden)
        described = Attention(
            eps=layer.eps,
            latent_eps=layer.latent_eps,
            scale=layer.scale,
            heads=heads,
            nope=layer.qk_nope_head_dim,
            rope=layer.qk_rope_head_dim,
            value=value,
        )
        for name, (weight, rows, cols) in expected.items():
            if (weight.rows, weight.cols) != (rows, cols):
                raise KernelError(f"{name} of an attention layer is {weight.rows} x {weight.cols}, not {rows} x {cols}")
            setattr(described, name, self.weight(weight)[1])
        norms = {"input_norm": (layer.input_norm, hidden), "kv_a_norm": (layer.kv_a_norm, latent)}
        if layer.q_a_norm is not None:
            norms["q_a_norm"] = (layer.q_a_norm, low)
        for name, (norm, width) in norms.items():
            check_rows(norm, width, 1)
            setattr(described, name, norm.data_ptr())
        return described

    def _describe_moe(self, layer: MoeLayer) -> Moe:
        experts, hidden = layer.router.shape
        check_rows(layer.bias, experts, 1)
        check_rows(layer.norm, hidden, 1)
        return Moe(
            router=router_weight(layer.router),
            shared=self._describe_mlp(layer.shared or ()),
            norm=layer.norm.data_ptr(),
            bias=layer.bias.data_ptr(),
            config=describe_router(layer.shape, experts),
            eps=layer.eps,
            has_shared=int(layer.shared is not None),
        )

    def _describe_dense(self, layer: DenseLayer) -> Moe:
        hidden = layer.mlp[0].cols
        check_rows(layer.norm, hidden, 1)
        router = Weight(F32, 0, 0, 0, 0, hidden, 0, 0)
        return Moe(router, self._describe_mlp(layer.mlp), layer.norm.data_ptr(), eps=layer.eps, has_shared=1)

    def _describe_mlp(self, mlp: Sequence[QuantizedTensor]) -> Any:
        """gate, up and down, if there are any."""
        if mlp and mlp[0].codec.name != mlp[1].codec.name:
            raise KernelError(f"gate is {mlp[0].codec.name} and up {mlp[1].codec.name}: one block takes one codec")
        return (Weight * 3)(*(self.weight(weight)[1] for weight in mlp))


def router_weight(weight: Tensor) -> Weight:
    """The description of a router's weight [E, H]; KernelError unless it is contiguous bfloat16 or float32."""
    kinds = {torch.bfloat16: BF16, torch.float32: F32}
    if weight.dtype not in kinds or not weight.is_contiguous() or weight.dim() != 2:
        raise KernelError(
            f"expected a contiguous router [E, H] in bfloat16 or float32, not {weight.dtype} {tuple(weight.shape)}"
        )
    return Weight(kinds[weight.dtype], 0, 0, 0, *weight.shape, weight.data_ptr(), 0)


def check_rows(x: Tensor, cols: int, rows: int | None = None) -> int:
    """Number of rows of a contiguous float32 tensor whose last dimension is `cols`; KernelError for any other."""
    if x.dtype is not torch.float32 or not x.is_contiguous() or x.shape[-1] != cols:
        raise KernelError(f"expected contiguous float32 [.., {cols}], not {x.dtype} {tuple(x.shape)}")
    found = x.numel() // cols
    if rows is not None and found != rows:
        raise KernelError(f"expected {rows} rows of {cols}, not {found}")
    return found
