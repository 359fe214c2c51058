"""Sources whose experts are int4 already (Kimi-K2-Thinking): copied byte for byte, or encoded again, or refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from conftest import SMALL
from safetensors import safe_open
from safetensors.torch import save_file

import offload
from convert.dry_run import DryRun
from convert.inspect import inspect
from convert.pipeline import convert
from convert.synthetic import TINY_CONFIG, write_checkpoint
from convert.verify import verify
from offload.errors import CheckpointError
from offload.quant import get_codec
from offload.store import Store
from offload.types import PROJECTIONS, ExpertId

KIMI_QUANTIZATION: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                **{"actorder": None, "block_structure": None, "dynamic": False, "group_size": 32, "num_bits": 4},
                **{"observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int"},
            },
        }
    },
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny K2-Thinking: model_type kimi_k2, BF16, every routed expert packed by compressed-tensors."""
    folder = tmp_path_factory.mktemp("kimi")
    config = copy.deepcopy(TINY_CONFIG) | {"model_type": "kimi_k2", "moe_intermediate_size": 128}
    write_checkpoint(folder, config, seed=4, quantized=False, shards=2, **SMALL)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for shard in folder.glob("*.safetensors"):
        tensors = {}
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                tensors |= _packed(name, tensor) if ".mlp.experts." in name else {name: tensor}
        save_file(tensors, shard)
        index["weight_map"] |= dict.fromkeys(tensors, shard.name)
        index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != shard.name or k in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_config(folder, KIMI_QUANTIZATION)
    return folder


def _packed(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    module = name.removesuffix(".weight")
    groups = weight.float().view(weight.shape[0], -1, 32)
    scale = (groups.abs().amax(2) / 7).to(torch.bfloat16)  # not how this program chooses scales
    codes = (groups / scale.float().unsqueeze(2)).round().clamp(-8, 7).to(torch.int8).view(weight.shape)
    return {
        f"{module}.weight_packed": pack_to_int32(codes, 4),
        f"{module}.weight_scale": scale,
        f"{module}.weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def write_config(folder: Path, quantization: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def linked(source: Path, folder: Path) -> Path:
    """A copy of the checkpoint whose config.json may be changed."""
    folder.mkdir()
    for path in source.iterdir():
        if path.name == "config.json":
            (folder / path.name).write_bytes(path.read_bytes())
        else:
            (folder / path.name).symlink_to(path)
    return folder


def test_experts_are_copied_byte_for_byte(kimi: Path, tmp_path: Path) -> None:
    convert(kimi, tmp_path / "s", workers=2)
    source, stored = tensors(kimi), tensors(tmp_path / "s")
    experts = [name for name in source if ".mlp.experts." in name]
    assert len(experts) == 2 * 8 * 3 * 3
    for name in experts:
        assert torch.equal(stored[name].view(torch.uint8), source[name].view(torch.uint8)), name
    store = Store.open(tmp_path / "s")
    assert store.layout.codec.name == "int4-g32" and store.config.model_type == "kimi_k2"
    assert set(store.manifest.resident_codecs.values()) >= {"int8-g128", "bf16"}
    assert all(error == (0.0, 0.0, 0.0) for record in store.manifest.layers.values() for error in record.errors)
    assert verify(tmp_path / "s", source=str(kimi)).ok
    with offload.load(tmp_path / "s", kernels="reference") as engine:
        assert torch.isfinite(engine.logits([5, 6, 7])).all()


def test_the_runtime_sees_what_the_source_means(kimi: Path, tmp_path: Path) -> None:
    """Against a BF16 checkpoint with the decoded weights: the same logits."""
    source = tensors(kimi)
    decoded = {name: tensor for name, tensor in source.items() if ".mlp.experts." not in name}
    for name in source:
        if name.endswith(".weight_packed"):
            module = name.removesuffix(".weight_packed")
            words = source[name].view(torch.uint8)
            codes = torch.stack((words & 15, words >> 4), dim=2).flatten(1).float() - 8
            scale = source[f"{module}.weight_scale"].float().repeat_interleave(32, 1)
            decoded[f"{module}.weight"] = (codes * scale).to(torch.bfloat16)
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file(decoded, plain / "model.safetensors")
    config = json.loads((kimi / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    convert(plain, tmp_path / "a", experts="bf16", resident="bf16")
    convert(kimi, tmp_path / "b", resident="bf16")
    logits = []
    for name in ("a", "b"):
        with offload.load(tmp_path / name, kernels="reference") as engine:
            logits.append(engine.logits([5, 6, 7, 400]))
    assert torch.equal(*logits)


@pytest.mark.parametrize("experts", ["int4-g128", "int3-g32", "int8-g128", "bf16", "fp8", "nf4-b64"])
def test_another_codec_encodes_the_decoded_weights(kimi: Path, tmp_path: Path, experts: str) -> None:
    report = convert(kimi, tmp_path / "s", experts=experts, dry_run=True)
    assert isinstance(report, DryRun)
    assert any("adds an error of its own" in line for line in report.lines())
    convert(kimi, tmp_path / "s", experts=experts)
    source, store = tensors(kimi), Store.open(tmp_path / "s")
    extent = store.locate(ExpertId(2, 3))
    raw = extent.path.read_bytes()[extent.offset : extent.offset + extent.nbytes]
    views = store.layout.views(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
    int4, codec = get_codec("int4-g32"), get_codec(experts)
    for projection in PROJECTIONS:
        module = f"model.layers.2.mlp.experts.3.{projection}"
        shape = store.layout.shape(projection)
        parts = {suffix: source[f"{module}.{suffix}"] for suffix in ("weight_packed", "weight_scale")}
        expected = codec.encode(int4.decode(parts, *shape, torch.float32), "ls")
        assert torch.equal(views.projections[projection].dequantize(), codec.decode(expected, *shape))


def test_it_is_told_before(kimi: Path, tmp_path: Path) -> None:
    report = convert(kimi, tmp_path / "s", dry_run=True)
    assert isinstance(report, DryRun)
    assert report.plan.recipe.experts == "int4-g32"
    assert any("int4-g32 in the source: copied byte for byte" in line for line in report.lines())
    seen = inspect(kimi)
    assert seen.components["routed experts"].codecs == {"int4-g32"} and seen.quant_method == "compressed-tensors"
    assert seen.components["routed experts"].parameters == 2 * 8 * 3 * 256 * 128


def change(path: str, value: Any) -> dict[str, Any]:
    quantization = copy.deepcopy(KIMI_QUANTIZATION)
    *parents, last = path.split(".")
    inner = quantization
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return quantization


WEIGHTS = "config_groups.group_0.weights"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (f"{WEIGHTS}.symmetric", False, "symmetric = False"),
        (f"{WEIGHTS}.actorder", "group", "actorder = 'group'"),
        (f"{WEIGHTS}.strategy", "channel", "strategy = 'channel'"),
        (f"{WEIGHTS}.type", "float", "type = 'float'"),
        (f"{WEIGHTS}.num_bits", 5, "unknown codec 'int5-g32'"),
        (f"{WEIGHTS}.group_size", 16, "unknown codec 'int4-g16'"),
        ("format", "marlin-24", "format 'marlin-24'"),
        ("config_groups.group_0.input_activations", {"num_bits": 8}, "input_activations"),
        ("config_groups.group_1", {"targets": ["lm_head"]}, "2 config_groups"),
        ("quant_method", "gptq", "'gptq' is not supported"),
        (f"{WEIGHTS}.group_size", 64, "shape .* for int4-g64"),
        (f"{WEIGHTS}.num_bits", 8, "shape .* for int8-g32"),
    ],
)
def test_other_schemes_are_refused_by_name(kimi: Path, tmp_path: Path, path: str, value: Any, message: str) -> None:
    folder = linked(kimi, tmp_path / "c")
    write_config(folder, change(path, value))
    with pytest.raises(offload.errors.OffloadError, match=message):
        convert(folder, tmp_path / "s", dry_run=True)


@pytest.mark.parametrize(
    ("suffix", "value", "message"),
    [
        ("weight_scale", torch.nan, "1 of 1024 scales are NaN"),
        ("weight_shape", 7, r"says \[7, 256\]"),
        ("weight_shape", None, "has no tensor"),
    ],
)
def test_damaged_experts_are_named(kimi: Path, tmp_path: Path, suffix: str, value: float | None, message: str) -> None:
    name = f"model.layers.1.mlp.experts.6.up_proj.{suffix}"
    folder = tmp_path / "c"
    folder.mkdir()
    found = tensors(kimi)
    if value is None:
        del found[name]
    else:
        found[name].view(-1)[0] = value
    save_file(found, folder / "model.safetensors")
    (folder / "config.json").write_bytes((kimi / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=message) as fault:
        convert(folder, tmp_path / "s")
    assert name in str(fault.value)
