"""Stores hold what the source holds: every codec, ragged edges, BF16 sources, other block sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import SMALL, digests
from safetensors import safe_open

from convert.dry_run import DryRun
from convert.pipeline import convert
from convert.synthetic import TINY_CONFIG, write_checkpoint
from offload.quant import get_codec
from offload.store import Store
from offload.types import PROJECTIONS, ExpertId


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors by the index, through the safetensors package."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {}
    for file in sorted(set(index.values())):
        with safe_open(folder / file, framework="pt") as shard:
            tensors |= {name: shard.get_tensor(name) for name in shard.keys() if index[name] == file}  # noqa: SIM118
    assert set(tensors) == set(index)
    return tensors


def weight(tensors: dict[str, torch.Tensor], module: str, block: tuple[int, int] = (128, 128)) -> torch.Tensor:
    """The fp32 weight of `module`, decoded element by element in plain words."""
    w = tensors[f"{module}.weight"].float()
    scale = tensors.get(f"{module}.weight_scale_inv")
    if scale is None:
        return w
    i, j = torch.arange(w.shape[0]) // block[0], torch.arange(w.shape[1]) // block[1]
    return w * scale[i][:, j]


def requantized(w: torch.Tensor, name: str, scales: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """What a store of an FP8 source holds: FP8 blocks pass through, everything else is encoded again."""
    codec = get_codec(name)
    return w.to(dtype) if name == "fp8" else codec.decode(codec.encode(w, scales), *w.shape, dtype)


def expert(store: Store, which: ExpertId) -> dict[str, torch.Tensor]:
    """bf16 matrices of an expert, read at its computed address."""
    extent = store.locate(which)
    raw = extent.path.read_bytes()[extent.offset : extent.offset + extent.nbytes]
    views = store.layout.views(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
    return {projection: views.projections[projection].dequantize() for projection in PROJECTIONS}


@pytest.mark.parametrize(
    ("experts", "resident", "scales"),
    [
        ("int4-g32", None, "rtn"),
        ("int4-g32", "fp8", "ls"),
        ("int8-g128", "int8-g128", "rtn"),
        ("int4-g128", "bf16", "ls"),
        ("fp8", None, "rtn"),
        ("bf16", "int8-g128", "rtn"),
    ],
)
def test_every_weight_is_the_codec_of_the_source(
    checkpoint: Path, tmp_path: Path, experts: str, resident: str | None, scales: str
) -> None:
    source = read_tensors(checkpoint)
    report = convert(checkpoint, tmp_path / "s", experts=experts, resident=resident, scales=scales, workers=2)
    assert not isinstance(report, DryRun)
    store = Store.open(tmp_path / "s")

    for which in (ExpertId(1, 0), ExpertId(2, 7)):
        for projection, got in expert(store, which).items():
            w = weight(source, f"model.layers.{which.layer}.mlp.experts.{which.expert}.{projection}")
            assert torch.equal(got, requantized(w, experts, scales))
            error = float((requantized(w, experts, scales, torch.float32) - w).norm() / w.norm())
            recorded = store.manifest.layers[which.layer].errors[which.expert][PROJECTIONS.index(projection)]
            assert recorded == pytest.approx(error, rel=1e-4, abs=1e-9)

    for module, name in store.manifest.resident_codecs.items():
        expected = requantized(weight(source, module), name, scales)
        assert torch.equal(store.resident(module).dequantize(), expected)

    for name, tensor in source.items():
        if "norm" in name and "layers.3." not in name:
            assert torch.equal(store.tensor(name), tensor)
    router = "model.layers.1.mlp.gate"
    assert torch.equal(store.tensor(f"{router}.weight"), source[f"{router}.weight"])
    bias = store.tensor(f"{router}.e_score_correction_bias")
    assert bias.dtype == torch.float32
    assert torch.equal(bias, source[f"{router}.e_score_correction_bias"])


def test_the_store_is_a_sound_safetensors_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "s")
    tensors = read_tensors(tmp_path / "s")
    name = "model.layers.2.mlp.experts.5.down_proj"
    assert tensors[f"{name}.weight_shape"].tolist() == [256, 160]
    assert tensors[f"{name}.weight_packed"].shape == (256, 20)
    assert not any(tensor.startswith("model.layers.3.") for tensor in tensors), "MTP layer must be left out"
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "s" / file).read_bytes() == (checkpoint / file).read_bytes()
    leftovers = [p.name for p in (tmp_path / "s").iterdir() if p.suffix == ".partial" or p.name == ".convert"]
    assert leftovers == []


def test_fp8_store_keeps_every_byte(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "s", experts="fp8")
    source, stored = read_tensors(checkpoint), read_tensors(tmp_path / "s")
    for name, tensor in stored.items():
        assert tensor.dtype == source[name].dtype
        assert torch.equal(tensor.view(torch.uint8), source[name].view(torch.uint8)), name


@pytest.mark.parametrize("experts", ["fp8", "int4-g32"])
def test_other_block_sizes(tmp_path: Path, experts: str) -> None:
    quantization = TINY_CONFIG["quantization_config"] | {"weight_block_size": [32, 48]}
    folder = write_checkpoint(tmp_path / "c", quantization_config=quantization, **SMALL)
    convert(folder, tmp_path / "s", experts=experts, scales="rtn")
    store = Store.open(tmp_path / "s")
    w = weight(read_tensors(folder), "model.layers.1.mlp.experts.3.down_proj", (32, 48))
    codec = get_codec(experts)
    expected = w.to(torch.bfloat16) if experts == "fp8" else codec.decode(codec.encode(w), *w.shape)
    assert torch.equal(expert(store, ExpertId(1, 3))["down_proj"], expected)
    assert store.manifest.recipe["experts"] == ("fp8-b32x48" if experts == "fp8" else experts)


@pytest.mark.parametrize("experts", ["fp8", "int4-g32", "bf16"])
def test_bf16_source(tmp_path: Path, experts: str) -> None:
    folder = write_checkpoint(tmp_path / "c", quantized=False, shards=1, q_lora_rank=None, **SMALL)
    convert(folder, tmp_path / "s", experts=experts, scales="rtn")
    store = Store.open(tmp_path / "s")
    source = read_tensors(folder)
    for name in ("gate_proj", "down_proj"):
        w = weight(source, f"model.layers.1.mlp.experts.2.{name}")
        codec = get_codec(experts)
        assert torch.equal(expert(store, ExpertId(1, 2))[name], codec.decode(codec.encode(w), *w.shape))
    assert torch.equal(store.resident("lm_head").dequantize(), source["lm_head.weight"])


def test_result_does_not_depend_on_workers_or_shards(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "a", workers=1)
    convert(checkpoint, tmp_path / "b", workers=4)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    again = write_checkpoint(tmp_path / "c", seed=1, shards=2, mtp=True, tokenizer=True, **SMALL)
    convert(again, tmp_path / "d")
    a, d = digests(tmp_path / "a"), digests(tmp_path / "d")
    assert {name for name in a if a[name] != d[name]} == {"expertpager.json", "expertpager.json.bak"}


def test_ragged_resident_tensors_stay_bf16_and_are_reported(checkpoint: Path, tmp_path: Path) -> None:
    report = convert(checkpoint, tmp_path / "s", dry_run=True)
    assert isinstance(report, DryRun)
    assert not (tmp_path / "s").exists()
    codecs = report.plan.resident_codecs
    assert codecs["model.layers.0.self_attn.q_b_proj"] == "bf16"  # 96 columns
    assert codecs["model.layers.0.self_attn.o_proj"] == "int8-g128"
    assert any("q_b_proj" in line and "bf16" in line for line in report.lines())
    assert any("multi-token-prediction layer 3" in line for line in report.lines())


def test_dry_run_predicts_sizes(checkpoint: Path, tmp_path: Path) -> None:
    report = convert(checkpoint, tmp_path / "s", dry_run=True)
    assert isinstance(report, DryRun)
    done = convert(checkpoint, tmp_path / "s")
    assert not isinstance(done, DryRun)
    assert done.source_nbytes == report.plan.fetch_nbytes
    for name, size in report.plan.file_sizes.items():
        assert (tmp_path / "s" / name).stat().st_size == size
    assert 0.9 < done.nbytes / report.plan.store_nbytes < 1.1
