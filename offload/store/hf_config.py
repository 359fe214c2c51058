"""The `quantization_config` that makes a store a standard Hugging Face checkpoint.

Owns the mapping from codecs to what other engines expect to read in config.json. Stores whose experts
stay in the official FP8 keep the official description (`quant_method: fp8`, scales named
`weight_scale_inv`); all others are described in the words of compressed-tensors. Must not read files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from offload.quant import Codec, get_codec
from offload.quant.fp8 import Fp8Codec
from offload.quant.grouped import GroupedIntCodec

EMBEDDING = "model.embed_tokens"
"""HF module name of the token embedding."""

_EXPERTS = r"re:.*\.mlp\.experts\.\d+\.(gate|up|down)_proj$"


def store_config(
    source_config: Mapping[str, Any], experts: str, resident_codecs: Mapping[str, str]
) -> dict[str, Any]:
    """config.json of a store: the source's, with the quantization_config of its codecs.

    `experts` is the codec of all routed experts, `resident_codecs` maps every resident linear module
    to its codec.
    """
    config = {k: v for k, v in source_config.items() if k != "quantization_config"}
    quantization = _quantization_config(get_codec(experts), resident_codecs)
    if quantization:
        config["quantization_config"] = quantization
    # The extra next-token prediction layers are not part of a store.
    config["num_nextn_predict_layers"] = 0
    return config


def scale_suffix(config: Mapping[str, Any]) -> str:
    """How scales are called in the files of a store with this config.json."""
    method = (config.get("quantization_config") or {}).get("quant_method")
    return "weight_scale_inv" if method == "fp8" else "weight_scale"


def _quantization_config(experts: Codec, resident: Mapping[str, str]) -> dict[str, Any] | None:
    used = {name for name in resident.values() if name != "bf16"}
    if experts.name == "bf16" and not used:
        return None
    plain = sorted(module for module, name in resident.items() if name == "bf16")
    if isinstance(experts, Fp8Codec) and used <= {experts.name}:
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(experts.block),
            "modules_to_not_convert": plain,
        }
    groups = {}
    if experts.name != "bf16":
        groups["group_0"] = _group(experts, [_EXPERTS])
    for index, name in enumerate(sorted(used), start=1):
        modules = sorted(module for module, codec in resident.items() if codec == name)
        # "Linear" where one codec serves all: loaders tell the experts' group by its regex. Embeddings are no Linear.
        targets = ["Linear", *(m for m in modules if m == EMBEDDING)] if len(used) == 1 else modules
        groups[f"group_{index}"] = _group(get_codec(name), targets)
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*plain, r"re:.*\.mlp\.gate$"],
    }


def _group(codec: Codec, targets: list[str]) -> dict[str, Any]:
    weights: dict[str, Any] = {"symmetric": True, "dynamic": False, "actorder": None, "observer": "minmax"}
    if isinstance(codec, GroupedIntCodec):
        weights |= {"num_bits": codec.bits, "type": "int", "strategy": "group", "group_size": codec.group}
        packing = "pack-quantized"
    else:
        assert isinstance(codec, Fp8Codec), codec
        weights |= {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": list(codec.block)}
        packing = "float-quantized"
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": packing,
    }
