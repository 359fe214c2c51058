"""What a weight format is, and the registry of formats by name.

Owns the `Codec` contract and `QuantizedTensor`, a weight in the bytes of its format. Must not know
files, layouts or kernels: a codec maps a float matrix to a few raw tensors and back.

A codec's name carries all of its parameters (`int4-g32`, `fp8`, `fp8-b32x32`), so a name in a
manifest is enough to read the weight.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from offload.errors import CodecError


@dataclass(frozen=True)
class TensorSpec:
    """One raw tensor of an encoded weight: its suffix after the module's name, dtype and shape."""

    suffix: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Codec(ABC):
    """A weight format for matrices [rows, cols] = [out_features, in_features].

    `decode(encode(w))` is deterministic, and encoding the decoded weight again gives the same bytes
    for every format whose scales are derived from the weight alone.
    """

    name: str
    row_unit: int = 1
    """A weight cut at multiples of so many rows gives strips whose raw tensors, joined, are those of the whole."""

    @abstractmethod
    def parts(self, rows: int, cols: int) -> tuple[TensorSpec, ...]:
        """The raw tensors of a [rows, cols] weight: payload first, then scales."""

    @abstractmethod
    def encode(
        self, weight: Tensor, method: str = "rtn", importance: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Raw tensors by suffix for `weight` (float, [rows, cols]).

        `method` chooses how scales are found where a format has a choice (`rtn`, `ls`);
        `importance` [cols] weighs the columns' squared errors (mean squared activations).
        Raises CodecError for non-finite weights.
        """

    @abstractmethod
    def decode(
        self, parts: Mapping[str, Tensor], rows: int, cols: int, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        """The weight [rows, cols]: product of code and scale in fp32, rounded once to `dtype`.

        This is what transformers and compressed-tensors compute, so both see the same weights.
        """

    def companions(self, rows: int, cols: int) -> dict[str, Tensor]:
        """Small constant tensors, by suffix, that other engines expect beside a [rows, cols] weight."""
        return {}

    def shape_of(self, payload: tuple[int, ...], companion: Callable[[str], Tensor]) -> tuple[int, int]:
        """(rows, cols) of a stored weight, from the shape of its payload or from a companion read by suffix."""
        rows, cols = payload
        return rows, cols

    def rows_of(self, parts: Mapping[str, Tensor], rows: int, cols: int, ids: Tensor) -> Tensor:
        """Rows `ids` (int64 [T]) of the weight, decoded to bf16 [T, cols] without decoding the others.

        This is for formats whose parts all have one entry per row; others override it.
        """
        chosen = {suffix: part.index_select(0, ids) for suffix, part in parts.items()}
        return self.decode(chosen, ids.numel(), cols)

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes of all raw tensors of a [rows, cols] weight."""
        return sum(spec.nbytes for spec in self.parts(rows, cols))

    def fits(self, rows: int, cols: int) -> bool:
        """Whether other engines can read a [rows, cols] weight in this format (no ragged groups)."""
        return True

    def __repr__(self) -> str:
        return f"<codec {self.name}>"


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight [rows, cols] in the bytes of its format. The parts may be views into a slot."""

    codec: Codec
    rows: int
    cols: int
    parts: Mapping[str, Tensor]

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The weight as a dense tensor, each element rounded once to `dtype`."""
        return self.codec.decode(self.parts, self.rows, self.cols, dtype)

    def rows_of(self, ids: Tensor) -> Tensor:
        """Rows `ids` (int64 [T]) as bf16 [T, cols], each element rounded once."""
        return self.codec.rows_of(self.parts, self.rows, self.cols, ids)

    def to(self, device: torch.device) -> QuantizedTensor:
        """The same weight on `device`."""
        return QuantizedTensor(
            self.codec, self.rows, self.cols, {name: part.to(device) for name, part in self.parts.items()}
        )

    @property
    def nbytes(self) -> int:
        return self.codec.nbytes(self.rows, self.cols)


def require_finite(weight: Tensor, codec: str) -> None:
    """Raise CodecError when `weight` holds NaN or infinity: no format may hide that."""
    # One reduction decides; the count is only computed for the message.
    if not math.isfinite(float(weight.abs().amax()) if weight.numel() else 0.0):
        bad = int((~torch.isfinite(weight)).sum())
        raise CodecError(f"cannot encode as {codec}: {bad} of {weight.numel()} weights are NaN or infinite")


@cache
def get_codec(name: str) -> Codec:
    """The codec called `name`. Raises CodecError listing the known names."""
    for pattern, build in _factories():
        match = re.fullmatch(pattern, name)
        if match:
            return build(*(int(group) for group in match.groups() if group is not None))
    raise CodecError(f"unknown codec {name!r}; known codecs: {', '.join(codec_names())}")


def codec_names() -> tuple[str, ...]:
    """The names offered to users, best quality first."""
    return ("bf16", "fp8", "int8-g128", "int4-g32", "nf4-b64", "int4-g128", "int3-g32", "int2-g32")


def _factories() -> tuple[tuple[str, Callable[..., Codec]], ...]:
    # Imported here because the formats' modules import this one for the base class.
    from offload.quant.fp8 import Fp8Codec
    from offload.quant.grouped import GroupedIntCodec
    from offload.quant.nf4 import Nf4Codec
    from offload.quant.plain import Bf16Codec

    return (
        ("bf16", Bf16Codec),
        (r"fp8(?:-b(\d+)x(\d+))?", Fp8Codec),
        (r"int(8|4|3|2)-g(32|64|128)", GroupedIntCodec),
        (r"nf4-b(64)", Nf4Codec),
    )
