"""Grouped integers out of a source's weights: the torch reference and the compiled encoder, with the same bytes.

Owns the choice between them and the binding of the compiled one (offload/kernels/csrc/requantize.cpp). Both also give
the error against the source, summed in one fixed order. Must not know checkpoints or files.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from offload.errors import CodecError, KernelError, UsageError
from offload.kernels.native_library import library_path
from offload.quant import Codec
from offload.quant.grouped import GroupedIntCodec
from offload.types import ceil_div

_STRIP = 1 << 20  # weights handled at a time by the reference: its temporaries stay small
_GROUP = 32  # weights whose squared errors are added in fp32; the sums of groups are added in fp64
_SOURCES = {torch.float8_e4m3fn: 0, torch.bfloat16: 1, torch.float32: 2}


@dataclass(frozen=True)
class Encoded:
    """Raw tensors by suffix, and the relative RMSE against the source."""

    parts: dict[str, Tensor]
    error: float


class Encoder(Protocol):
    """Encodes a weight [rows, cols], which may be FP8 with one scale per block."""

    name: str

    def encode(
        self, weight: Tensor, scale: Tensor | None, block: tuple[int, int], codec: Codec, method: str
    ) -> Encoded:
        """The bytes of `codec` for `weight`. Raises CodecError for weights that are NaN or infinite."""


class ReferenceEncoder:
    """The codec itself, in torch, a strip of rows at a time."""

    name = "reference"

    def encode(
        self, weight: Tensor, scale: Tensor | None, block: tuple[int, int], codec: Codec, method: str
    ) -> Encoded:
        strips: list[dict[str, Tensor]] = []
        sums: list[Tensor] = []
        for w in _strips(weight, scale, block, codec.row_unit):
            parts = codec.encode(w, method)
            decoded = codec.decode(parts, w.shape[0], w.shape[1], torch.float32)
            strips.append(parts)
            sums.append(torch.stack([_group_sums((decoded - w).square_()), _group_sums(w.square())]))
        joined = {suffix: torch.cat([strip[suffix] for strip in strips]) for suffix in strips[0]}
        squared_error, squared_weight = _fold(torch.cat(sums, dim=1)).tolist()
        return Encoded(joined, relative_rmse(squared_error, squared_weight))


class NativeEncoder:
    """The compiled encoder for grouped integers; other codecs are left to the reference."""

    name = "native"

    def __init__(self, isa: str = "auto") -> None:
        self.isa = isa.encode()
        self._library = _library()
        self._reference = ReferenceEncoder()
        if not self._library.ep_requantize_supports(self.isa):
            raise KernelError(f"this processor does not support {isa!r}")

    def encode(
        self, weight: Tensor, scale: Tensor | None, block: tuple[int, int], codec: Codec, method: str
    ) -> Encoded:
        if not isinstance(codec, GroupedIntCodec) or weight.dtype not in _SOURCES:
            return self._reference.encode(weight, scale, block, codec, method)
        rows, cols = weight.shape
        weight = weight.contiguous()
        scale = None if scale is None else scale.contiguous()
        parts = {spec.suffix: torch.empty(spec.shape, dtype=spec.dtype) for spec in codec.parts(rows, cols)}
        work = torch.empty(2, rows * ceil_div(cols, _GROUP), dtype=torch.float64)
        sums = torch.empty(2, dtype=torch.float64)
        status = self._library.ep_requantize_groups(
            self.isa,
            weight.data_ptr(),
            _SOURCES[weight.dtype],
            rows,
            cols,
            None if scale is None else scale.data_ptr(),
            *block,
            codec.bits,
            codec.group,
            method == "ls",
            parts["weight_packed"].data_ptr(),
            parts["weight_scale"].data_ptr(),
            work.data_ptr(),
            sums.data_ptr(),
        )
        if status == 1:
            # The reference says how many there are, in the same words with and without a compiler.
            self._reference.encode(weight, scale, block, codec, "rtn")
        if status != 0:
            raise CodecError(f"the compiled encoder refused a {rows}x{cols} weight for {codec.name} (status {status})")
        return Encoded(parts, relative_rmse(*sums.tolist()))


def select_encoder(name: str = "auto") -> tuple[Encoder, str | None]:
    """The encoder called `name` (auto, native, reference), and a line for the user when auto had to fall back."""
    if name == "reference":
        return ReferenceEncoder(), None
    if name not in ("auto", "native"):
        raise UsageError(f"unknown kernels {name!r}; known: auto, native, reference")
    try:
        return NativeEncoder(), None
    except KernelError as fault:
        if name == "native":
            raise
        return ReferenceEncoder(), f"encoding with torch, many times slower: {fault}"


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    path = library_path()
    if path is None:
        raise KernelError("the compiled kernels were not built; install a C++17 compiler and reinstall the package")
    try:
        library = ctypes.CDLL(str(path))
        pointer, count, number = c_void_p, c_int64, c_int32
        library.ep_requantize_groups.restype = number
        library.ep_requantize_groups.argtypes = (
            c_char_p, pointer, number, count, count, pointer, count, count,
            number, number, number, pointer, pointer, pointer, pointer,
        )  # fmt: skip
        library.ep_requantize_supports.restype = number
        library.ep_requantize_supports.argtypes = (c_char_p,)
    except (OSError, AttributeError) as fault:
        raise KernelError(f"{path} cannot be used ({fault}); reinstall the package to rebuild it") from None
    return library


def relative_rmse(squared_error: float, squared_weight: float) -> float:
    """sqrt(squared_error / squared_weight) to six digits; 0 for an all-zero weight, 1 when the squares overflow."""
    if not math.isfinite(squared_error + squared_weight):
        return 1.0
    return float(f"{(squared_error / squared_weight) ** 0.5:.6g}") if squared_weight else 0.0


def decode(weight: Tensor, scale: Tensor | None, block: tuple[int, int]) -> Tensor:
    """float32 [rows, cols]: q * S[i // block rows, j // block cols], or the float weight itself."""
    return torch.cat(list(_strips(weight, scale, block, 1)))


def _strips(weight: Tensor, scale: Tensor | None, block: tuple[int, int], unit_rows: int) -> Iterator[Tensor]:
    """The weight in fp32, some rows at a time; every strip but the last has a multiple of `unit_rows` rows."""
    rows, cols = weight.shape
    unit = int(np.lcm(block[0] if scale is not None else 1, unit_rows))
    step = max(1, _STRIP // (unit * max(1, cols))) * unit
    for start in range(0, rows, step):
        strip = weight[start : start + step]
        yield strip.float() if scale is None else _decode_fp8(strip, scale[start // block[0] :], block)


def _decode_fp8(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    cols = weight.shape[1]
    # A lookup per byte is three times faster than converting the dtype.
    values = np.take(_fp8_table(), weight.view(torch.uint8).numpy())
    wide = np.repeat(scale.numpy(), block[1], axis=1)[:, :cols]
    with np.errstate(over="ignore"):  # the codec refuses what overflows
        for index, start in enumerate(range(0, len(values), block[0])):
            values[start : start + block[0]] *= wide[index]
    return torch.from_numpy(values)


@lru_cache(maxsize=1)
def _fp8_table() -> np.ndarray:
    """The float32 value of every e4m3 byte."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


def _group_sums(squares: Tensor) -> Tensor:
    """fp64 [groups]: sums over 32 neighbours of each row, each pair of halves added in fp32."""
    padded = torch.nn.functional.pad(squares, (0, -squares.shape[1] % _GROUP))
    return _fold(padded.view(-1, _GROUP)).double()


def _fold(x: Tensor) -> Tensor:
    """Sum over the last dimension by adding its upper half to its lower half until one value is left."""
    size = 1 << max(0, x.shape[-1] - 1).bit_length()
    x = torch.nn.functional.pad(x, (0, size - x.shape[-1]))
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]
