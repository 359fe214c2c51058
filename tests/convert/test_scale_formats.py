"""FP8 sources of DeepSeek-V3.1 (`scale_fmt: ue8m0`) and scales in other dtypes: the multiplier is what counts."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from safetensors import safe_open
from safetensors.torch import save_file

from convert.pipeline import convert
from convert.synthetic import TINY_CONFIG, write_checkpoint
from offload.errors import CheckpointError
from offload.quant import get_codec
from offload.store import Store
from offload.types import ExpertId

MODULE = "model.layers.1.mlp.experts.2.down_proj"


def v31(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A tiny V3.1: every scale a power of two, stored as `dtype`; returns its tensors."""
    config = copy.deepcopy(TINY_CONFIG)
    config["quantization_config"]["scale_fmt"] = "ue8m0"
    write_checkpoint(folder, config, seed=6, shards=1, **SMALL)
    (shard,) = folder.glob("*.safetensors")
    with safe_open(shard, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            tensors[name] = torch.exp2(torch.log2(tensor).ceil()).to(dtype)
    save_file(tensors, shard)
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("experts", ["fp8", "int4-g32"])
def test_powers_of_two_in_any_dtype(tmp_path: Path, dtype: torch.dtype, experts: str) -> None:
    tensors = v31(tmp_path / "c", dtype)
    convert(tmp_path / "c", tmp_path / "s", experts=experts)
    store = Store.open(tmp_path / "s")
    scale = tensors[f"{MODULE}.weight_scale_inv"].float()
    i, j = torch.arange(256) // 128, torch.arange(160) // 128
    weight = tensors[f"{MODULE}.weight"].float() * scale[i][:, j]
    extent = store.locate(ExpertId(1, 2))
    raw = extent.path.read_bytes()[extent.offset : extent.offset + extent.nbytes]
    got = store.layout.views(torch.frombuffer(bytearray(raw), dtype=torch.uint8)).down_proj
    codec = get_codec(experts)
    if experts == "fp8":
        assert torch.equal(got.parts["weight"].view(torch.uint8), tensors[f"{MODULE}.weight"].view(torch.uint8))
        assert torch.equal(got.parts["weight_scale"], scale)
    else:
        assert torch.equal(got.dequantize(), codec.decode(codec.encode(weight, "ls"), 256, 160))
    written = json.loads((tmp_path / "s" / "config.json").read_text())["quantization_config"]
    assert written.get("scale_fmt") == ("ue8m0" if experts == "fp8" else None)


@pytest.mark.parametrize("experts", ["fp8", "int4-g32"])
def test_weights_beyond_the_largest_number_are_named(tmp_path: Path, experts: str) -> None:
    tensors = v31(tmp_path / "c", torch.float32)
    tensors[f"{MODULE}.weight_scale_inv"][0, 0] = 3e38
    save_file(tensors, next((tmp_path / "c").glob("*.safetensors")))
    with pytest.raises(CheckpointError, match=f"{MODULE}.weight: .* infinite"):
        convert(tmp_path / "c", tmp_path / "s", experts=experts)
    tensors[f"{MODULE}.weight"].view(torch.uint8)[:128, :128] = 0  # nothing is multiplied by it
    save_file(tensors, next((tmp_path / "c").glob("*.safetensors")))
    convert(tmp_path / "c", tmp_path / "s", experts=experts)


def test_a_scale_that_is_no_number_is_named(tmp_path: Path) -> None:
    tensors = v31(tmp_path / "c", torch.float8_e8m0fnu)
    tensors[f"{MODULE}.weight_scale_inv"].view(torch.uint8)[0, 0] = 255
    save_file(tensors, next((tmp_path / "c").glob("*.safetensors")))
    with pytest.raises(CheckpointError, match=f"{MODULE}.weight_scale_inv: 1 of 4 scales are NaN"):
        convert(tmp_path / "c", tmp_path / "s")
