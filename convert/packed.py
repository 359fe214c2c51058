"""Checkpoints that are quantized already: experts in `pack-quantized` integers, as in Kimi-K2-Thinking.

Owns the reading of the source's quantization_config: which codec of ours has exactly these bytes. What it does not
know to be the same (zero points, activation order, several schemes, other packings) is refused by name. Must not read
tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from offload.errors import CheckpointError, CodecError
from offload.quant import get_codec
from offload.quant.grouped import GroupedIntCodec

PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
"""Suffixes of the tensors of a packed weight."""

_WEIGHTS: dict[str, tuple[Any, ...]] = {
    "type": ("int",),
    "symmetric": (True,),
    "strategy": ("group",),
    "dynamic": (False, None),
    "actorder": (None, False),
    "block_structure": (None,),
}
"""Values of a scheme's `weights` that mean code times scale of the group; the first is what is expected."""


def packed_codec(config: Mapping[str, Any], source: str) -> GroupedIntCodec | None:
    """The codec of the packed weights of a checkpoint with this config.json, or None when nothing is packed.

    Raises CheckpointError for a quantization that this converter cannot read; `source` names the checkpoint.
    """
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    if method in (None, "fp8"):
        return None
    what = f"{source} is quantized already ({method})"
    if method != "compressed-tensors":
        raise CheckpointError(f"{what}; convert the FP8 or BF16 release")
    schemes = [dict(group) for group in (quantization.get("config_groups") or {}).values()]
    if len(schemes) != 1:
        raise CheckpointError(
            f"{what} with {len(schemes)} config_groups; only one scheme, for the routed experts, can be read; "
            "convert the FP8 or BF16 release"
        )
    packing = schemes[0].get("format") or quantization.get("format")
    if packing != "pack-quantized":
        raise CheckpointError(f"{what} in format {packing!r}; supported: pack-quantized")
    for key in ("input_activations", "output_activations"):
        if schemes[0].get(key) is not None:
            raise CheckpointError(f"{what} with {key}, which changes the mathematics; convert the FP8 or BF16 release")
    weights = schemes[0].get("weights") or {}
    for key, allowed in _WEIGHTS.items():
        if weights.get(key, allowed[-1]) not in allowed:
            raise CheckpointError(f"{what} with {key} = {weights[key]!r}; supported: {allowed[0]!r}")
    name = f"int{weights.get('num_bits')}-g{weights.get('group_size')}"
    try:
        codec = get_codec(name)
    except CodecError as fault:
        raise CheckpointError(f"{what}: {fault}") from None
    assert isinstance(codec, GroupedIntCodec), codec
    return codec
