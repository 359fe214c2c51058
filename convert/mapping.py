"""What each tensor of a checkpoint is: part of a routed expert, a resident linear, kept as it is, left out.

Owns the names and shapes a DeepSeek-V3 family checkpoint must have. Every expected tensor must be there with its
shape and a dtype this converter reads; a tensor nobody expects is refused by name. Must not know codecs or stores'
files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from convert.packed import PACKED, SHAPE
from convert.packed import SCALE as PACKED_SCALE
from convert.source import Checkpoint, TensorInfo
from offload.config import ModelConfig
from offload.errors import CheckpointError
from offload.quant.grouped import GroupedIntCodec
from offload.store.layout import expert_module
from offload.types import PROJECTIONS, ExpertId, ceil_div

SCALE = "weight_scale_inv"
"""The official name of the multiplier of an FP8 block."""

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")  # buffers of old exports; computed from the config
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Linear:
    """A weight matrix [rows, cols]: floats, FP8 with a scale per block, or packed integers.

    Packed integers are in the bytes of `codec` and come with the `shape` they were packed from.
    """

    module: str
    rows: int
    cols: int
    weight: TensorInfo
    scale: TensorInfo | None
    codec: GroupedIntCodec | None = None
    shape: TensorInfo | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors to load."""
        return tuple(info.name for info in self._parts)

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self._parts)

    @property
    def _parts(self) -> list[TensorInfo]:
        return [info for info in (self.weight, self.scale, self.shape) if info is not None]


@dataclass(frozen=True)
class CheckpointMap:
    """A checkpoint's tensors by role.

    `linears[layer]` and `kept[layer]` are resident; the layer None is embedding, final norm and head. `kept` tensors
    (norms, router weight and bias) are never quantized. `left_out` belongs to no part of a store.
    """

    config: ModelConfig
    block: tuple[int, int]
    experts: dict[ExpertId, dict[str, Linear]]
    linears: dict[int | None, list[Linear]]
    kept: dict[int | None, list[TensorInfo]]
    left_out: list[TensorInfo]

    @property
    def left_out_line(self) -> str | None:
        """One line about what a store does not hold, or None."""
        if not self.left_out:
            return None
        nbytes = sum(info.nbytes for info in self.left_out)
        return (
            f"left out: {len(self.left_out)} tensors ({nbytes / 1e9:.2f} GB) of the multi-token-prediction layer "
            f"{self.config.num_hidden_layers}; generation does not need them, --mtp keeps them"
        )

    @property
    def mtp_line(self) -> str | None:
        """One line about the multi-token-prediction layers that a store will hold, or None."""
        layers = [layer for layer in self.config.mtp_layers if layer in self.linears]
        if not layers:
            return None
        nbytes = sum(item.nbytes for layer in layers for item in self.kept[layer])
        nbytes += sum(linear.nbytes for layer in layers for linear in self.linears[layer])
        experts = (item for which, item in self.experts.items() if which.layer in layers)
        nbytes += sum(linear.nbytes for item in experts for linear in item.values())
        names = ", ".join(str(layer) for layer in layers)
        return (
            f"kept: multi-token-prediction layer {names} ({nbytes / 1e9:.2f} GB of the source); the runtime does not "
            "use it yet"
        )


def map_checkpoint(
    checkpoint: Checkpoint, config: ModelConfig, mtp: bool = False, packed: GroupedIntCodec | None = None
) -> CheckpointMap:
    """Sort the tensors of `checkpoint` by role; with `mtp` also those of the multi-token-prediction layers.

    `packed` is the codec of weights that are quantized already.
    Raises CheckpointError for a missing tensor or scale, a wrong shape or dtype, and a tensor nobody expects.
    """
    if mtp and not config.mtp_layers:
        raise CheckpointError(
            f"{checkpoint.source.name} has no multi-token-prediction layer (num_nextn_predict_layers is 0 in "
            "config.json); leave out --mtp"
        )
    block = config.weight_block_size or (128, 128)
    reader = _Reader(checkpoint, block, packed)
    layers = [*range(config.num_hidden_layers), *(config.mtp_layers if mtp else ())]
    experts = {
        ExpertId(layer, expert): {
            projection: reader.linear(expert_module(ExpertId(layer, expert), projection), *shape)
            for projection, shape in zip(PROJECTIONS, _mlp(config, config.moe_intermediate_size), strict=True)
        }
        for layer in layers
        if config.has_experts(layer)
        for expert in range(config.n_routed_experts)
    }
    linears: dict[int | None, list[Linear]] = {}
    kept: dict[int | None, list[TensorInfo]] = {}
    for layer in (None, *layers):
        linears[layer] = [
            reader.linear(module, *shape)
            for module, shape in linear_shapes(config, layer)
            if not _is_copy(module) or f"{module}.weight" in checkpoint.tensors
        ]
        kept[layer] = [reader.kept(name, shape) for name, shape in kept_shapes(config, layer)]
    return CheckpointMap(config, block, experts, linears, kept, reader.rest(len(layers)))


def linear_shapes(config: ModelConfig, layer: int | None) -> Iterator[tuple[str, tuple[int, int]]]:
    """Resident weight matrices [out, in] of a decoder layer, or of embedding and head (layer None)."""
    hidden = config.hidden_size
    if layer is None:
        yield "model.embed_tokens", (config.vocab_size, hidden)
        yield "lm_head", (config.vocab_size, hidden)
        return
    attn = f"model.layers.{layer}.self_attn"
    heads, rank = config.num_attention_heads, config.kv_lora_rank
    q_rows = heads * config.qk_head_dim
    if config.q_lora_rank is None:
        yield f"{attn}.q_proj", (q_rows, hidden)
    else:
        yield f"{attn}.q_a_proj", (config.q_lora_rank, hidden)
        yield f"{attn}.q_b_proj", (q_rows, config.q_lora_rank)
    yield f"{attn}.kv_a_proj_with_mqa", (rank + config.qk_rope_head_dim, hidden)
    yield f"{attn}.kv_b_proj", (heads * (config.qk_nope_head_dim + config.v_head_dim), rank)
    yield f"{attn}.o_proj", (hidden, heads * config.v_head_dim)
    if layer in config.mtp_layers:
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.eh_proj", (hidden, 2 * hidden)
        yield f"{prefix}.embed_tokens", (config.vocab_size, hidden)
        yield f"{prefix}.shared_head.head", (config.vocab_size, hidden)
    if not config.has_experts(layer):
        mlp, width = f"model.layers.{layer}.mlp", config.intermediate_size
    elif config.n_shared_experts:
        mlp = f"model.layers.{layer}.mlp.shared_experts"
        width = config.moe_intermediate_size * config.n_shared_experts
    else:
        return
    for projection, shape in zip(PROJECTIONS, _mlp(config, width), strict=True):
        yield f"{mlp}.{projection}", shape


def kept_shapes(config: ModelConfig, layer: int | None) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensors that stay as they are: norms, the router's weight and its correction bias."""
    hidden = config.hidden_size
    if layer is None:
        yield "model.norm.weight", (hidden,)
        return
    prefix = f"model.layers.{layer}"
    yield f"{prefix}.input_layernorm.weight", (hidden,)
    if config.q_lora_rank is not None:
        yield f"{prefix}.self_attn.q_a_layernorm.weight", (config.q_lora_rank,)
    yield f"{prefix}.self_attn.kv_a_layernorm.weight", (config.kv_lora_rank,)
    yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
    if layer in config.mtp_layers:
        for name in ("enorm", "hnorm", "shared_head.norm"):
            yield f"{prefix}.{name}.weight", (hidden,)
    if config.has_experts(layer):
        yield f"{prefix}.mlp.gate.weight", (config.n_routed_experts, hidden)
        yield f"{prefix}.mlp.gate.e_score_correction_bias", (config.n_routed_experts,)


def _is_copy(module: str) -> bool:
    """Whether a multi-token-prediction layer may lack `module`, because it is a copy of the model's own."""
    return module.startswith("model.layers.") and module.endswith((".embed_tokens", ".shared_head.head"))


def _mlp(config: ModelConfig, width: int) -> tuple[tuple[int, int], ...]:
    """Shapes of gate, up and down projection of an MLP of `width`."""
    hidden = config.hidden_size
    return (width, hidden), (width, hidden), (hidden, width)


class _Reader:
    """Checks tensors against what is expected and remembers which ones were asked for."""

    def __init__(self, checkpoint: Checkpoint, block: tuple[int, int], packed: GroupedIntCodec | None) -> None:
        self.checkpoint = checkpoint
        self.block = block
        self.packed = packed
        self.seen: set[str] = set()

    def linear(self, module: str, rows: int, cols: int) -> Linear:
        if self.packed is not None and f"{module}.{PACKED}" in self.checkpoint.tensors:
            return self._packed(self.packed, module, rows, cols)
        weight = self._expect(f"{module}.weight", (rows, cols))
        if weight.dtype in _FLOATS:
            return Linear(module, rows, cols, weight, None)
        if weight.dtype != torch.float8_e4m3fn:
            raise CheckpointError(
                f"{self._where(weight)} has dtype {weight.dtype}; this converter reads FP8 (e4m3), bf16, f16 and f32"
            )
        name = f"{module}.{SCALE}"
        if name not in self.checkpoint.tensors:
            raise CheckpointError(
                f"{self._where(weight)} is FP8 but its scale {name} is missing: the weight cannot be decoded"
            )
        grid = (ceil_div(rows, self.block[0]), ceil_div(cols, self.block[1]))
        scale = self._expect(name, grid, f" for blocks of {self.block[0]}x{self.block[1]}")
        if not scale.dtype.is_floating_point:
            raise CheckpointError(f"{self._where(scale)} has dtype {scale.dtype}; a scale must be floating point")
        return Linear(module, rows, cols, weight, scale)

    def _packed(self, codec: GroupedIntCodec, module: str, rows: int, cols: int) -> Linear:
        payload, scales = codec.parts(rows, cols)
        weight = self._expect(f"{module}.{PACKED}", payload.shape, f" for {codec.name}")
        scale = self._expect(f"{module}.{PACKED_SCALE}", scales.shape, f" for {codec.name}")
        shape = self._expect(f"{module}.{SHAPE}", (2,))
        for info, dtypes in ((weight, (torch.int32,)), (scale, _FLOATS), (shape, (torch.int64, torch.int32))):
            if info.dtype not in dtypes:
                raise CheckpointError(f"{self._where(info)} has dtype {info.dtype}; expected {dtypes[0]}")
        return Linear(module, rows, cols, weight, scale, codec, shape)

    def kept(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        info = self._expect(name, shape)
        if info.dtype not in _FLOATS:
            raise CheckpointError(f"{self._where(info)} has dtype {info.dtype}; expected bf16, f16 or f32")
        return info

    def rest(self, layers: int) -> list[TensorInfo]:
        """Tensors of layers from number `layers` on. Raises CheckpointError when anything else is left."""
        left_out = []
        for name, info in self.checkpoint.tensors.items():
            if name in self.seen or _DERIVED.search(name):
                continue
            layer = _LAYER.match(name)
            if not layer or int(layer[1]) < layers:
                raise CheckpointError(
                    f"{self._where(info)} is not part of the model that config.json describes; "
                    "this converter does not know what to do with it"
                )
            left_out.append(info)
        return left_out

    def _expect(self, name: str, shape: tuple[int, ...], why: str = "") -> TensorInfo:
        info = self.checkpoint.info(name)
        if info.shape != shape:
            raise CheckpointError(
                f"{self._where(info)} has shape {list(info.shape)}; config.json implies {list(shape)}{why}"
            )
        self.seen.add(name)
        return info

    def _where(self, info: TensorInfo) -> str:
        return f"{self.checkpoint.source.where(info.file)}: {info.name}"
