"""Resident weights from a store, layer by layer.

Owns which tensor goes where, by HF name. Takes anything with the two reading methods of a store, so tests
can hand in a dict.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from offload.config import ModelConfig
from offload.model.attention import AttentionWeights
from offload.model.moe import MlpWeights, MoeWeights
from offload.model.place import Place
from offload.model.transformer import LayerWeights, ModelWeights
from offload.quant import QuantizedTensor


class WeightSource(Protocol):
    """Where resident weights come from."""

    def resident(self, module: str) -> QuantizedTensor:
        """The weight of a linear module, by HF name without `.weight`."""
        ...

    def tensor(self, name: str) -> Tensor:
        """A tensor exactly as stored."""
        ...


class PlacedWeights:
    """`source`, with every tensor on the device of its layer.

    The embedding stays in host memory, of which a token reads one row; final norm and head follow the last layer.
    """

    def __init__(self, source: WeightSource, places: Sequence[Place]) -> None:
        self._source = source
        self._places = places

    def resident(self, module: str) -> QuantizedTensor:
        weight = self._source.resident(module)
        place = self._place(module)
        if place is None:
            return weight
        with place.scope():
            return weight.to(place.device)

    def tensor(self, name: str) -> Tensor:
        value = self._source.tensor(name)
        place = self._place(name)
        if place is None:
            return value
        with place.scope():
            return value.to(place.device)

    def _place(self, name: str) -> Place | None:
        if name.startswith("model.embed_tokens"):
            return None
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        return self._places[int(layer[1])] if layer else self._places[-1]


def load_weights(source: WeightSource, config: ModelConfig) -> ModelWeights:
    """All resident weights of the model in `source`. Norms become fp32, all else stays as it is."""
    return ModelWeights(
        embed=source.resident("model.embed_tokens"),
        layers=tuple(_layer(source, config, layer) for layer in range(config.num_hidden_layers)),
        norm=source.tensor("model.norm.weight").float(),
        head=source.resident("lm_head"),
    )


def _layer(source: WeightSource, config: ModelConfig, layer: int) -> LayerWeights:
    prefix = f"model.layers.{layer}"
    is_moe = layer in config.moe_layers
    return LayerWeights(
        input_norm=source.tensor(f"{prefix}.input_layernorm.weight").float(),
        attention=_attention(source, config, f"{prefix}.self_attn"),
        post_attention_norm=source.tensor(f"{prefix}.post_attention_layernorm.weight").float(),
        mlp=None if is_moe else _mlp(source, f"{prefix}.mlp"),
        moe=_moe(source, config, f"{prefix}.mlp") if is_moe else None,
    )


def _attention(source: WeightSource, config: ModelConfig, prefix: str) -> AttentionWeights:
    has_q_lora = config.q_lora_rank is not None
    return AttentionWeights(
        q_a=source.resident(f"{prefix}.q_a_proj") if has_q_lora else None,
        q_a_norm=source.tensor(f"{prefix}.q_a_layernorm.weight").float() if has_q_lora else None,
        q_b=source.resident(f"{prefix}.q_b_proj" if has_q_lora else f"{prefix}.q_proj"),
        kv_a=source.resident(f"{prefix}.kv_a_proj_with_mqa"),
        kv_a_norm=source.tensor(f"{prefix}.kv_a_layernorm.weight").float(),
        kv_b=source.resident(f"{prefix}.kv_b_proj"),
        o=source.resident(f"{prefix}.o_proj"),
    )


def _moe(source: WeightSource, config: ModelConfig, prefix: str) -> MoeWeights:
    return MoeWeights(
        router=_router(source.tensor(f"{prefix}.gate.weight")),
        bias=source.tensor(f"{prefix}.gate.e_score_correction_bias").float(),
        shared=_mlp(source, f"{prefix}.shared_experts") if config.n_shared_experts else None,
    )


def _router(weight: Tensor) -> Tensor:
    """In bf16 as in the official checkpoint, which every token reads in half the time of fp32, or in fp32."""
    return weight if weight.dtype is torch.bfloat16 else weight.float()


def _mlp(source: WeightSource, prefix: str) -> MlpWeights:
    return MlpWeights(
        *(source.resident(f"{prefix}.{projection}") for projection in ("gate_proj", "up_proj", "down_proj"))
    )
