"""Where every byte of a store lies: names of files and tensors, the extent of each expert.

Owns all addresses of the format. An expert's address is computed, never searched: in the file of its
MoE layer the experts lie back to back at a fixed stride, each one as gate, up, down payloads followed
by gate, up, down scales; small constant tensors (`weight_shape` and the like) of all experts come after the
last expert.
Must not read or write files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from offload.quant import Codec, QuantizedTensor
from offload.store.safetensors import build_header
from offload.types import PAGE, PROJECTIONS, ExpertId, align_up

TensorSlot = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, dtype and shape of a tensor in a header."""


@dataclass(frozen=True)
class Field:
    """One raw tensor of an expert; `offset` counts from the expert's first byte."""

    projection: str
    suffix: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ExpertLayout:
    """The bytes of one routed expert in a given codec.

    `stride` is the exact number of bytes of an expert and the distance from one to the next.
    """

    codec: Codec
    hidden_size: int
    moe_intermediate_size: int

    def shape(self, projection: str) -> tuple[int, int]:
        """[out_features, in_features] of a projection."""
        h, m = self.hidden_size, self.moe_intermediate_size
        return (h, m) if projection == "down_proj" else (m, h)

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        """All raw tensors in the order of their bytes: payloads first, then scales."""
        specs = {p: self.codec.parts(*self.shape(p)) for p in PROJECTIONS}
        fields: list[Field] = []
        offset = 0
        for part in range(len(specs[PROJECTIONS[0]])):
            for projection in PROJECTIONS:
                spec = specs[projection][part]
                fields.append(
                    Field(projection, spec.suffix, spec.dtype, spec.shape, offset, spec.nbytes)
                )
                offset += spec.nbytes
        return tuple(fields)

    @cached_property
    def stride(self) -> int:
        last = self.fields[-1]
        return last.offset + last.nbytes

    @cached_property
    def slot_nbytes(self) -> int:
        """Bytes a slot needs so that direct I/O can read any expert with its enclosing pages."""
        return align_up(self.stride) if self.stride % PAGE == 0 else align_up(self.stride) + PAGE

    def views(self, buffer: Tensor) -> ExpertWeights:
        """The expert whose first byte is the first byte of `buffer` (uint8, at least `stride` long)."""
        return ExpertWeights(self, buffer)


@dataclass(frozen=True)
class ExpertWeights:
    """One expert in memory: its bytes as they lie on disk, and its matrices as views into them."""

    layout: ExpertLayout
    buffer: Tensor = field(repr=False)  # uint8 [>= stride]

    @cached_property
    def projections(self) -> dict[str, QuantizedTensor]:
        parts: dict[str, dict[str, Tensor]] = {projection: {} for projection in PROJECTIONS}
        for item in self.layout.fields:
            parts[item.projection][item.suffix] = _view(self.buffer, item)
        return {
            projection: QuantizedTensor(self.layout.codec, *self.layout.shape(projection), tensors)
            for projection, tensors in parts.items()
        }

    @property
    def gate_proj(self) -> QuantizedTensor:
        return self.projections["gate_proj"]

    @property
    def up_proj(self) -> QuantizedTensor:
        return self.projections["up_proj"]

    @property
    def down_proj(self) -> QuantizedTensor:
        return self.projections["down_proj"]


def _view(buffer: Tensor, item: Field) -> Tensor:
    raw = buffer[item.offset : item.offset + item.nbytes]
    if raw.data_ptr() % item.dtype.itemsize or raw.storage_offset() % item.dtype.itemsize:
        raw = raw.clone()  # odd sizes of tiny models: torch cannot view a misaligned element
    return raw.view(item.dtype).view(item.shape)


@dataclass(frozen=True)
class LayerFile:
    """The file with all routed experts of one MoE layer: header, experts, weight shapes.

    `scale_suffix` is the scale's name on disk (see `disk_suffix`).
    """

    layer: int
    n_routed_experts: int
    layout: ExpertLayout
    scale_suffix: str = "weight_scale"

    @property
    def name(self) -> str:
        return f"model-layer-{self.layer:05d}-experts.safetensors"

    @cached_property
    def header(self) -> bytes:
        return build_header(self.tensors())

    def tensors(self) -> Iterator[TensorSlot]:
        """Every tensor of the file in the order of its bytes."""
        for expert in range(self.n_routed_experts):
            for item in self.layout.fields:
                yield self._tensor(expert, item.projection, item.suffix), item.dtype, item.shape
        for expert in range(self.n_routed_experts):
            for projection, suffix, tensor in self._companions:
                yield self._tensor(expert, projection, suffix), tensor.dtype, tuple(tensor.shape)

    @cached_property
    def _companions(self) -> list[tuple[str, str, Tensor]]:
        """(projection, suffix, tensor) of the constant tensors of one expert."""
        codec = self.layout.codec
        return [
            (projection, suffix, tensor)
            for projection in PROJECTIONS
            for suffix, tensor in codec.companions(*self.layout.shape(projection)).items()
        ]

    @property
    def tail_names(self) -> str:
        """What the tail holds, for people."""
        return ", ".join(dict.fromkeys(suffix for _, suffix, _ in self._companions))

    @cached_property
    def tail(self) -> bytes:
        """The bytes after the last expert: the constant tensors of every projection of every expert."""
        return b"".join(tensor.numpy().tobytes() for _, _, tensor in self._companions) * self.n_routed_experts

    @property
    def data_start(self) -> int:
        return len(self.header)

    def offset(self, expert: int) -> int:
        """First byte of `expert` in the file."""
        return self.data_start + expert * self.layout.stride

    @property
    def tail_start(self) -> int:
        return self.offset(self.n_routed_experts)

    @property
    def nbytes(self) -> int:
        """Size of the finished file."""
        return self.tail_start + len(self.tail)

    def _tensor(self, expert: int, projection: str, suffix: str) -> str:
        module = expert_module(ExpertId(self.layer, expert), projection)
        return f"{module}.{disk_suffix(suffix, self.scale_suffix)}"


def expert_module(expert: ExpertId, projection: str) -> str:
    """HF module name of one projection of one routed expert."""
    return f"model.layers.{expert.layer}.mlp.experts.{expert.expert}.{projection}"


def disk_suffix(suffix: str, scale_suffix: str) -> str:
    """Name of a part on disk: scales carry the name the checkpoint's quantization_config implies.

    compressed-tensors says `weight_scale`; the official FP8 format says `weight_scale_inv` for the
    same multiplier.
    """
    return scale_suffix if suffix == "weight_scale" else suffix


def resident_file_name(layer: int | None) -> str:
    """File of the resident tensors of a decoder layer, or of embedding, final norm and head."""
    return "model-resident.safetensors" if layer is None else f"model-layer-{layer:05d}-resident.safetensors"
