"""One matrix of a checkpoint in the bytes of a codec.

Owns the choice between passing bytes through (lossless) and encoding them, and the refusal of numbers that are none:
every fault names the tensor. Must not know files.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from convert.encoder import Encoded, Encoder
from convert.mapping import Linear
from offload.errors import CheckpointError, CodecError
from offload.quant import Codec
from offload.quant.fp8 import Fp8Codec
from offload.quant.grouped import GroupedIntCodec

SAFE_SCALE = torch.finfo(torch.float32).max / 448
"""Times the largest code of any source, that of FP8, it is still a number."""

ENCODING = 1
"""Raised when the same recipe begins to give other bytes: a journal of the old ones is not continued."""


def requantize(
    linear: Linear, tensors: Mapping[str, Tensor], block: tuple[int, int], codec: Codec, method: str, encoder: Encoder
) -> Encoded:
    """Encode `linear`, whose tensors are in `tensors`, with `codec`.

    Raises CheckpointError, naming the tensor, for weights or scales that are NaN or infinite.
    """
    weight = tensors[linear.weight.name]
    scale = tensors[linear.scale.name].float() if linear.scale else None
    if linear.scale is not None and scale is not None and not bool(torch.isfinite(scale).all()):
        bad = int((~torch.isfinite(scale)).sum())
        raise CheckpointError(f"{linear.scale.name}: {bad} of {scale.numel()} scales are NaN or infinite")
    if linear.codec is not None:
        return _from_packed(linear, linear.codec, tensors, codec, method, encoder)
    if scale is not None and isinstance(codec, Fp8Codec) and codec.block == block:
        _require_numbers(linear, weight)
        return _passed_on(linear, codec, {"weight": weight, "weight_scale": scale})
    if weight.dtype == torch.bfloat16 and codec.name == "bf16":
        _require_numbers(linear, weight)
        return Encoded({"weight": weight}, 0.0)
    try:
        return encoder.encode(weight, scale, block, codec, method)
    except CodecError as fault:
        raise CheckpointError(f"{linear.weight.name}: {fault}") from None


def _from_packed(
    linear: Linear, source: GroupedIntCodec, tensors: Mapping[str, Tensor], codec: Codec, method: str, encoder: Encoder
) -> Encoded:
    """Integers of the source: its own bytes where `codec` is theirs, else decoded to fp32 and encoded again."""
    assert linear.scale is not None and linear.shape is not None
    found = tensors[linear.shape.name].tolist()
    if found != [linear.rows, linear.cols]:
        raise CheckpointError(f"{linear.shape.name} says {found}; config.json implies {[linear.rows, linear.cols]}")
    parts = {"weight_packed": tensors[linear.weight.name], "weight_scale": tensors[linear.scale.name]}
    if codec.name == source.name and parts["weight_scale"].dtype == torch.bfloat16:
        return _passed_on(linear, codec, parts)
    weight = source.decode(parts, linear.rows, linear.cols, torch.float32)
    try:
        return encoder.encode(weight, None, (1, 1), codec, method)
    except CodecError as fault:
        raise CheckpointError(f"{linear.weight.name}: {fault}") from None


def _passed_on(linear: Linear, codec: Codec, parts: dict[str, Tensor]) -> Encoded:
    """The source's own bytes, whose codes and scales are numbers; so must be what they stand for."""
    if float(parts["weight_scale"].abs().max()) > SAFE_SCALE:
        weight = codec.decode(parts, linear.rows, linear.cols, torch.float32)
        bad = int((~torch.isfinite(weight)).sum())
        if bad:
            raise CheckpointError(f"{linear.weight.name}: {bad} of {weight.numel()} weights are infinite")
    return Encoded(parts, 0.0)


def _require_numbers(linear: Linear, weight: Tensor) -> None:
    bad = count_no_numbers(weight)
    if bad:
        raise CheckpointError(f"{linear.weight.name}: {bad} of {weight.numel()} weights are NaN or infinite")


def count_no_numbers(tensor: Tensor) -> int:
    """How many elements are NaN or infinite."""
    if tensor.numel() == 0:
        return 0
    # On the bits: torch.isfinite runs at a tenth of the speed for 16 bits.
    magnitude: np.ndarray
    if tensor.dtype == torch.float8_e4m3fn:
        magnitude, limit = tensor.view(torch.uint8).numpy() & np.uint8(0x7F), 0x7F
    elif tensor.dtype == torch.bfloat16:
        magnitude, limit = tensor.view(torch.int16).numpy() & np.int16(0x7FFF), 0x7F80
    else:
        return int(np.count_nonzero(~np.isfinite(tensor.numpy())))
    return int(np.count_nonzero(magnitude >= limit)) if int(magnitude.max()) >= limit else 0
