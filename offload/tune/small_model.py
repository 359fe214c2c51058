"""A model of a large one's routing whose matrices are too small to matter.

Owns its sizes, random weights in memory, and a file of zeros as its experts. What is measured with it are `overhead`'s
and `overhead_gpu`'s.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from offload.config import ModelConfig
from offload.quant import QuantizedTensor, get_codec
from offload.store.layout import ExpertLayout
from offload.types import PAGE, ExpertId, Extent, align_up

CONTEXT = 512
"""Tokens."""


VOCABULARY = 64

V3_ROUTING = {"n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "n_shared_experts": 1}
"""Its routing."""


def routing_of(config: ModelConfig) -> dict[str, int]:
    """The same sizes of another model."""
    return {name: getattr(config, name) for name in V3_ROUTING}


def small_config(layers: int, **sizes: int) -> ModelConfig:
    """DeepSeek-V3's routing, matrices too small to matter; `sizes` by their names in config.json."""
    return ModelConfig.from_hf(
        {
            "model_type": "deepseek_v3",
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 64,
            "moe_intermediate_size": 32,
            "num_hidden_layers": layers,
            "first_k_dense_replace": 1,
            "num_attention_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
            "routed_scaling_factor": 2.5,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": CONTEXT,
            "norm_topk_prob": True,
        }
        | V3_ROUTING
        | sizes
    )


class RandomWeights:
    """Random resident weights of a model by HF name."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._shapes = _shapes(config)
        self._rng = torch.Generator().manual_seed(0)

    def resident(self, module: str) -> QuantizedTensor:
        last = module.rsplit(".", 1)[-1]
        rows, cols = self._shapes[f"shared {last}" if "shared_experts" in module else last]
        weight = torch.randn(rows, cols, generator=self._rng).mul(cols**-0.5).to(torch.bfloat16)
        return QuantizedTensor(get_codec("bf16"), rows, cols, {"weight": weight})

    def tensor(self, name: str) -> Tensor:
        c = self._config
        if name.endswith("norm.weight"):
            size = {"q_a_layernorm": c.q_lora_rank, "kv_a_layernorm": c.kv_lora_rank}.get(name.split(".")[-2])
            return torch.ones(size or c.hidden_size)
        if name.endswith("bias"):
            return torch.zeros(c.n_routed_experts)
        return torch.randn(c.n_routed_experts, c.hidden_size, generator=self._rng).to(torch.bfloat16)


class EmptyStore:
    """Experts of zeros in one file."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self.config = config
        self.layout = ExpertLayout(get_codec("int4-g32"), config.hidden_size, config.moe_intermediate_size)
        self.path = path
        self._step = align_up(self.layout.stride)
        with path.open("wb") as file:
            file.truncate(len(config.moe_layers) * config.n_routed_experts * self._step + PAGE)

    def locate(self, expert: ExpertId) -> Extent:
        index = (expert.layer - self.config.moe_layers[0]) * self.config.n_routed_experts + expert.expert
        return Extent(self.path, index * self._step, self.layout.stride)


def _shapes(c: ModelConfig) -> dict[str, tuple[int, int]]:
    """[out, in] by the last part of a module's name."""
    heads, hidden, rank = c.num_attention_heads, c.hidden_size, c.q_lora_rank or 0
    shared = c.moe_intermediate_size * c.n_shared_experts
    return {
        "q_a_proj": (rank, hidden),
        "q_b_proj": (heads * c.qk_head_dim, rank),
        "kv_a_proj_with_mqa": (c.latent_dim, hidden),
        "kv_b_proj": (heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank),
        "o_proj": (hidden, heads * c.v_head_dim),
        "gate_proj": (c.intermediate_size, hidden),
        "up_proj": (c.intermediate_size, hidden),
        "down_proj": (hidden, c.intermediate_size),
        "shared gate_proj": (shared, hidden),
        "shared up_proj": (shared, hidden),
        "shared down_proj": (hidden, shared),
        "embed_tokens": (c.vocab_size, hidden),
        "lm_head": (c.vocab_size, hidden),
    }
