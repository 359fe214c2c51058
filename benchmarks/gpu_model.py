"""True-shape layers for benchmarks of the device tier: DeepSeek-V3's sizes, synthetic weights, planted routing.

Owns configurations, synthetic weights and routing. Values do not matter to what is measured, so experts are a few
patterns over and over; every byte of every expert is on disk all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from offload.config import ModelConfig
from offload.quant import QuantizedTensor, get_codec
from offload.store.layout import ExpertLayout
from offload.tiers.device import Device
from offload.tiers.device_executor import DeviceExecutor
from offload.types import ExpertId, Extent, align_up

PATTERNS = 8
"""Different experts in a layer's file."""

_V3 = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 1,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "max_position_embeddings": 163840,
}
_TINY = _V3 | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 32,
    "max_position_embeddings": 4096,
}


def model_config(moe_layers: int, tiny: bool) -> dict[str, object]:
    """config.json of one dense layer and `moe_layers` MoE layers."""
    return (_TINY if tiny else _V3) | {"num_hidden_layers": 1 + moe_layers}


@dataclass
class SyntheticStore:
    """Experts in one file per layer, in `folder`."""

    path: Path
    config: ModelConfig
    layout: ExpertLayout

    @classmethod
    def write(cls, folder: Path, config: ModelConfig, codec: str = "int4-g32") -> SyntheticStore:
        store = cls(folder, config, ExpertLayout(get_codec(codec), config.hidden_size, config.moe_intermediate_size))
        folder.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(0)
        patterns = [random_expert(store.layout, generator) for _ in range(PATTERNS)]
        for layer in config.moe_layers:
            path = folder / f"{layer}.bin"
            if path.exists() and path.stat().st_size == config.n_routed_experts * store._step:
                continue
            with path.open("wb") as file:
                for expert in range(config.n_routed_experts):
                    file.write(patterns[(expert + layer) % PATTERNS].ljust(store._step, b"\0"))
        return store

    @property
    def _step(self) -> int:
        return align_up(self.layout.stride)

    def locate(self, expert: ExpertId) -> Extent:
        return Extent(self.path / f"{expert.layer}.bin", expert.expert * self._step, self.layout.stride)

    @property
    def experts_nbytes(self) -> int:
        return len(self.config.moe_layers) * self.config.n_routed_experts * self.layout.stride


def random_expert(layout: ExpertLayout, generator: torch.Generator) -> bytes:
    """Random codes, scales that keep the size of what goes through."""
    raw = bytearray(layout.stride)
    for field in layout.fields:
        cols = layout.shape(field.projection)[1]
        tensor = _raw(field.dtype, field.shape, cols, generator)
        raw[field.offset : field.offset + field.nbytes] = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return bytes(raw)


def _raw(dtype: torch.dtype, shape: Sequence[int], cols: int, generator: torch.Generator) -> Tensor:
    """Random codes, or scales with which outputs keep the size of inputs."""
    if dtype.is_floating_point and dtype.itemsize > 1:
        return torch.full(tuple(shape), 0.2 / math.sqrt(cols), dtype=dtype)
    if dtype.is_floating_point:
        return _repeated(torch.randn(_SAMPLE, generator=generator).to(dtype), shape)
    info = torch.iinfo(dtype)
    return _repeated(torch.randint(info.min, info.max, (_SAMPLE,), generator=generator, dtype=dtype), shape)


_SAMPLE = 1_000_003
"""Random values that are repeated to fill a tensor: drawing all of a layer would take longer than measuring it."""


def _repeated(values: Tensor, shape: Sequence[int]) -> Tensor:
    count = math.prod(shape)
    raw = values.view(torch.uint8) if values.dtype.itemsize == 1 else values
    return raw.repeat(-(-count // raw.numel()))[:count].view(values.dtype).view(tuple(shape))


def random_weight(codec: str, rows: int, cols: int, generator: torch.Generator) -> QuantizedTensor:
    """A weight [rows, cols] of random codes whose product keeps about the size of what goes in."""
    made = get_codec(codec)

    def part(dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        if dtype == torch.bfloat16 and shape[-1] == cols:  # a plain weight, not scales
            return _repeated((torch.randn(_SAMPLE, generator=generator) / math.sqrt(cols)).to(dtype), shape)
        tensor = _raw(dtype, shape, cols, generator)
        return tensor / 16 if dtype == torch.bfloat16 and codec.startswith("int8") else tensor

    return QuantizedTensor(
        made, rows, cols, {spec.suffix: part(spec.dtype, spec.shape) for spec in made.parts(rows, cols)}
    )


class SyntheticWeights:
    """Resident weights by HF name, made when they are asked for."""

    def __init__(self, config: ModelConfig, codec: str = "int8-g128") -> None:
        self._config = config
        self._codec = get_codec(codec)
        self._generator = torch.Generator().manual_seed(1)

    def resident(self, module: str) -> QuantizedTensor:
        rows, cols = self._shape(module)
        codec = "bf16" if module in ("lm_head", "model.embed_tokens") else self._codec.name
        return random_weight(codec, rows, cols, self._generator)

    def tensor(self, name: str) -> Tensor:
        c = self._config
        if name.endswith("norm.weight"):
            size = {"q_a_layernorm": c.q_lora_rank, "kv_a_layernorm": c.kv_lora_rank}.get(name.split(".")[-2])
            return torch.ones(size or c.hidden_size)
        if name.endswith("e_score_correction_bias"):
            return torch.zeros(c.n_routed_experts)
        return torch.randn(c.n_routed_experts, c.hidden_size, generator=self._generator) / math.sqrt(c.hidden_size)

    def nbytes(self, layer: int | None) -> int:
        """Resident bytes of a decoder layer; of final norm and head for None."""
        c = self._config
        if layer is None:
            return 2 * c.vocab_size * c.hidden_size + 4 * c.hidden_size
        prefix = f"model.layers.{layer}"
        mlp = ["mlp"] if layer not in c.moe_layers else ["mlp.shared_experts"]
        modules = [f"self_attn.{p}" for p in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")]
        modules += [f"{part}.{p}" for part in mlp for p in ("gate_proj", "up_proj", "down_proj")]
        total = sum(self._codec.nbytes(*self._shape(f"{prefix}.{module}")) for module in modules)
        return total + (4 * c.n_routed_experts * (c.hidden_size + 1) if layer in c.moe_layers else 0)

    def _shape(self, module: str) -> tuple[int, int]:
        c = self._config
        heads, hidden, last = c.num_attention_heads, c.hidden_size, module.rsplit(".", 1)[-1]
        inner = c.moe_intermediate_size * c.n_shared_experts if "shared_experts" in module else c.intermediate_size
        return {
            "q_a_proj": (c.q_lora_rank or 0, hidden),
            "q_b_proj": (heads * c.qk_head_dim, c.q_lora_rank or 0),
            "kv_a_proj_with_mqa": (c.latent_dim, hidden),
            "kv_b_proj": (heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank),
            "o_proj": (hidden, heads * c.v_head_dim),
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
            "lm_head": (c.vocab_size, hidden),
            "embed_tokens": (c.vocab_size, hidden),
        }[last]


class PlantedRouting:
    """`inner`, told other experts than the router chose; weights stay the router's.

    `prepare` draws them for all layers and puts them onto the device, so that nothing of it falls into a step.
    """

    early_routers = 0  # what is planted is known to nobody in advance

    def __init__(self, inner: DeviceExecutor, choose: PlantedChoice, device: Device) -> None:
        self._inner = inner
        self._choose = choose
        self._device = device
        self._planted: dict[int, Tensor] = {}

    def prepare(self, tokens: int, k: int) -> None:
        """The next step has so many tokens, each of which uses `k` experts."""
        choose = self._choose
        there = self._device.torch_device
        self._planted = {n: torch.tensor(choose(n, tokens, k)).to(there) for n in choose.layers}

    def begin_step(self, tokens: Sequence[int]) -> None:
        self._inner.begin_step(tokens)

    def preference(self, layer: int, ids: Tensor) -> Tensor | None:
        return None

    def lookahead(self) -> int:
        return 0

    def foresight(self) -> int:
        return 0

    def foresee(self, layers: Sequence[int], ids: Tensor) -> None:
        self._inner.foresee(layers, ids)

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        self._inner.expect(layer, experts)

    def hint(self, layer: int, ids: Tensor, weights: Tensor) -> None:
        self._inner.hint(layer, self._planted[layer], weights)

    def __call__(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self._inner(layer, x, self._planted[layer], weights)

    def present(self, layer: int, x: Tensor, ids: Tensor) -> None:
        self._inner.present(layer, x, ids)

    def combined(self, layer: int, ids: Tensor, weights: Tensor) -> Tensor:
        return self._inner.combined(layer, ids, weights)

    def send(self, layer: int, ids: Tensor) -> None:
        with self._device.guard():
            self._device.compute.copy(ids, self._planted[layer])
        self._inner.send(layer, ids)

    def complete(self, layer: int, x: Tensor) -> None:
        self._inner.complete(layer, x)


class PlantedChoice:
    """Which experts a layer uses: by a skewed popularity, or so that a given share of them is resident."""

    def __init__(self, config: ModelConfig, slot: Callable[[int, int], int], skew: float = 0.7) -> None:
        """`slot(layer, expert)` is negative for an expert that VRAM does not hold."""
        self._experts = config.n_routed_experts
        self._slot = slot
        self.layers = config.moe_layers
        self._rng = np.random.default_rng(0)
        rank = np.arange(1, self._experts + 1) ** -skew
        self._chances = {layer: self._rng.permutation(rank / rank.sum()) for layer in config.moe_layers}
        self.hits: float | None = None
        """Share of resident experts to choose; None: by popularity."""

    def __call__(self, layer: int, tokens: int, k: int) -> list[list[int]]:
        if self.hits is None or tokens > 1:
            chances = self._chances[layer]
            return [self._rng.choice(self._experts, k, replace=False, p=chances).tolist() for _ in range(tokens)]
        resident = [e for e in range(self._experts) if self._slot(layer, e) >= 0]
        absent = [e for e in range(self._experts) if self._slot(layer, e) < 0]
        count = min(round(self.hits * k), len(resident))
        count = max(count, k - len(absent))
        return [self._draw(resident, count) + self._draw(absent, k - count)]

    def _draw(self, pool: list[int], count: int) -> list[int]:
        return self._rng.choice(pool, count, replace=False).tolist() if count else []
