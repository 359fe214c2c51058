"""Counts of a real model's shapes are the published ones; tables agree with files and manifest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from convert.inspect import inspect, parameter_counts
from convert.pipeline import convert
from convert.synthetic import V3_CONFIG
from offload.config import ModelConfig
from offload.errors import CheckpointError, StoreError, UsageError


def test_deepseek_v3_has_its_published_parameters() -> None:
    components = parameter_counts(ModelConfig.from_hf(V3_CONFIG))
    assert sum(item.parameters for item in components.values()) == 671_026_419_200
    assert components["routed experts"].parameters == 14_848 * 44_040_192


def test_checkpoint(checkpoint: Path) -> None:
    found = inspect(checkpoint)
    shards = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert 0 < shards - found.nbytes < 1 << 20  # the headers
    assert found.kind == "checkpoint"
    assert found.components["MTP"].nbytes > 0
    assert found.components["attention"].codecs == {"fp8"}
    assert found.components["routers"].codecs == {"bf16", "fp32"}
    routed = found.components["routed experts"].parameters
    assert found.active_parameters == found.parameters - routed * 6 // 8 - 512 * 256
    with pytest.raises(UsageError, match="only a store"):
        inspect(checkpoint, errors=True)


def test_store_with_errors(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "s")
    found = inspect(tmp_path / "s", errors=True)
    assert found.kind == "store"
    assert found.parameters == inspect(checkpoint).parameters
    assert found.components["routed experts"].codecs == {"int4-g32"}
    values = found.to_dict()
    assert set(values["errors"]) == {"1", "2"}
    assert 0.08 < values["errors"]["1"]["gate_proj"]["mean"] < 0.11
    worst = values["worst_experts"]
    assert [item["error"] for item in worst] == sorted((item["error"] for item in worst), reverse=True)
    assert worst[0]["error"] == max(row[p]["max"] for row in values["errors"].values() for p in row)
    assert any("int8-g128" in line for line in found.lines())


def test_an_expert_that_stands_out(checkpoint: Path, tmp_path: Path) -> None:
    """One expert with a few huge weights: its groups keep little of the others."""
    source = shutil.copytree(checkpoint, tmp_path / "c")
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    index = json.loads((source / "model.safetensors.index.json").read_text())
    shard = source / index["weight_map"][name]
    data = bytearray(shard.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    small = torch.full((160, 256), 0.01).to(torch.float8_e4m3fn)
    small[:, ::32] = 448.0
    small[:, 1::2] = 20.0
    data[8 + length + begin : 8 + length + end] = small.view(torch.uint8).numpy().tobytes()
    shard.write_bytes(data)
    convert(source, tmp_path / "s", scales="rtn")
    page = tmp_path / "errors.html"
    found = inspect(tmp_path / "s", errors=True, html=page)
    (outlier,) = found.to_dict()["outliers"]
    assert (outlier["layer"], outlier["expert"], outlier["projection"]) == (1, 5, "up_proj")
    assert outlier["ratio_to_median"] > 1.2
    assert any("outliers in their layer: 1" in line for line in found.lines())
    text = page.read_text()
    assert text.count("<svg") == 2 and "up_proj" in text
    with pytest.raises(UsageError, match="give --errors too"):
        inspect(tmp_path / "s", html=page)


def test_neither_checkpoint_nor_finished_store(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        inspect(tmp_path)
    (tmp_path / ".convert").mkdir()
    with pytest.raises(StoreError, match="not finished"):
        inspect(tmp_path)
