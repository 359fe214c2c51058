"""The `quantization_config` that makes a store a standard Hugging Face checkpoint.

Owns the mapping from codecs to what other engines expect to read in config.json. Stores whose experts
stay in the official FP8 keep the official description (`quant_method: fp8`, scales named
`weight_scale_inv`); integers are described in the words of compressed-tensors, NF4 in those of bitsandbytes.
NF4 beside other formats has no common description: config.json then says `quant_method: expertpager`, so that
other engines refuse the store instead of running on weights they did not read. Must not read files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from offload.quant import Codec, get_codec
from offload.quant.fp8 import Fp8Codec
from offload.quant.grouped import GroupedIntCodec
from offload.quant.nf4 import Nf4Codec

OWN_METHOD = "expertpager"
"""quant_method of stores that only this program reads."""

_EXPERTS = r"re:.*\.mlp\.experts\.\d+\.(gate|up|down)_proj$"

EMBEDDING = "model.embed_tokens"
"""HF module name of the token embedding."""


def is_embedding(module: str) -> bool:
    """Whether `module` is a token embedding: the model's, or the copy in a multi-token-prediction layer."""
    return module.endswith(".embed_tokens")


def store_config(
    source_config: Mapping[str, Any], experts: str, resident_codecs: Mapping[str, str], mtp_layers: int = 0
) -> dict[str, Any]:
    """config.json of a store: the source's, with the quantization_config of its codecs.

    `experts` is the codec of all routed experts, `resident_codecs` maps every resident linear module
    to its codec, `mtp_layers` is how many multi-token-prediction layers the store holds.
    """
    config = {k: v for k, v in source_config.items() if k != "quantization_config"}
    quantization = _quantization_config(get_codec(experts), resident_codecs)
    if quantization:
        scale_format = (source_config.get("quantization_config") or {}).get("scale_fmt")
        if scale_format is not None and quantization["quant_method"] == "fp8":
            quantization["scale_fmt"] = scale_format  # other engines round their activations' scales by it
        config["quantization_config"] = quantization
    config["num_nextn_predict_layers"] = mtp_layers
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
    everything = {experts.name} | used
    if any(isinstance(get_codec(name), Nf4Codec) for name in everything):
        if everything == {experts.name} and not any(
            is_embedding(module) and codec != "bf16" for module, codec in resident.items()  # it knows Linear only
        ):
            return {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "load_in_8bit": False,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_quant_storage": "uint8",
                "bnb_4bit_use_double_quant": False,
                "bnb_4bit_compute_dtype": "bfloat16",
                "llm_int8_skip_modules": plain,
            }
        codecs = {name: sorted(module for module, codec in resident.items() if codec == name) for name in sorted(used)}
        return {"quant_method": OWN_METHOD, "experts": experts.name, "resident": codecs, "ignore": plain}
    groups = {}
    if experts.name != "bf16":
        groups["group_0"] = _group(experts, [_EXPERTS])
    for index, name in enumerate(sorted(used), start=1):
        modules = sorted(module for module, codec in resident.items() if codec == name)
        # "Linear" where one codec serves all: loaders tell the experts' group by its regex. Embeddings are no Linear.
        targets = ["Linear", *(m for m in modules if is_embedding(m))] if len(used) == 1 else modules
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
