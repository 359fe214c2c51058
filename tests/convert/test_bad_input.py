"""Bad input gets one clear line naming the file and the numbers, and nothing already written is damaged."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL, digests

from convert import pipeline
from convert.pipeline import convert
from convert.synthetic import write_checkpoint
from convert.verify import verify
from offload.errors import BudgetError, CheckpointError, CodecError, ConfigError, OffloadError, StoreError, UsageError
from offload.store import Store

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.fixture
def source(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return shutil.copytree(checkpoint, tmp_path / "checkpoint")


def shard_of(folder: Path, tensor: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][tensor]


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the JSON header of a shard in place."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def patch_tensor(folder: Path, tensor: str, value: bytes, at: int = 0) -> None:
    path = shard_of(folder, tensor)
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin, _ = json.loads(data[8 : 8 + length])[tensor]["data_offsets"]
    start = 8 + length + begin + at
    data[start : start + len(value)] = value
    path.write_bytes(data)


def refused(source: Path, out: Path, kind: type[OffloadError], *words: str, **options: Any) -> str:
    """Convert, expect `kind` with all `words` in one line."""
    with pytest.raises(kind) as caught:
        convert(source, out, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def test_missing_shard(source: Path, tmp_path: Path) -> None:
    path = shard_of(source, EXPERT)
    path.unlink()
    refused(source, tmp_path / "s", CheckpointError, path.name, "1 of 3 shards")
    assert not (tmp_path / "s").exists()


def test_truncated_shard(source: Path, tmp_path: Path) -> None:
    path = shard_of(source, EXPERT)
    size = path.stat().st_size
    os.truncate(path, size - 5000)
    refused(source, tmp_path / "s", CheckpointError, path.name, "truncated", str(size - 5000))
    os.truncate(path, 5)
    refused(source, tmp_path / "s", CheckpointError, path.name)


def test_shard_cut_while_converting(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that comes up short is an error, never zeros."""
    path = shard_of(source, EXPERT)
    original = pipeline.plan_conversion

    def plan_then_cut(*args: Any, **kwargs: Any) -> Any:
        plan = original(*args, **kwargs)
        os.truncate(path, path.stat().st_size // 2)
        return plan

    monkeypatch.setattr(pipeline, "plan_conversion", plan_then_cut)
    refused(source, tmp_path / "s", CheckpointError, path.name, "truncated")
    assert not (tmp_path / "s" / "expertpager.json").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: e.update(data_offsets=[0, 10**12]), ("spans",)),
        (lambda e: e.update(data_offsets=[10**12, 10**12 + 160 * 256]), ("corrupt header", "byte")),
        (lambda e: e.update(data_offsets=[-5, 160 * 256 - 5]), ("data_offsets",)),
        (lambda e: e.update(shape=[161, 256]), ("spans",)),
        (lambda e: e.update(shape=[-160, -256]), ("shape",)),
        (lambda e: e.update(dtype="F9"), ("F9",)),
        (lambda e: e.pop("dtype"), ("dtype",)),
    ],
)
def test_corrupt_header_entry(
    source: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], words: tuple[str, ...]
) -> None:
    path = shard_of(source, EXPERT)
    edit_header(path, lambda header: change(header[EXPERT]))
    refused(source, tmp_path / "s", CheckpointError, path.name, *words)


@pytest.mark.parametrize("length", [2**63, 10**9, 0])
def test_impossible_header_length(source: Path, tmp_path: Path, length: int) -> None:
    path = shard_of(source, EXPERT)
    data = path.read_bytes()
    path.write_bytes(length.to_bytes(8, "little") + data[8:])
    refused(source, tmp_path / "s", CheckpointError, path.name, "header")


def test_header_that_is_not_json(source: Path, tmp_path: Path) -> None:
    path = shard_of(source, EXPERT)
    data = path.read_bytes()
    path.write_bytes(data[:8] + b"\xff" + data[9:])
    refused(source, tmp_path / "s", CheckpointError, path.name, "header")


def test_index_names_a_tensor_the_shard_lacks(source: Path, tmp_path: Path) -> None:
    path = shard_of(source, EXPERT)
    edit_header(path, lambda header: header.update({"other": header.pop(EXPERT)}))
    refused(source, tmp_path / "s", CheckpointError, EXPERT, path.name, "index")


def test_a_tensor_in_two_shards(source: Path, tmp_path: Path) -> None:
    path = shard_of(source, EXPERT)
    other = next(file for file in sorted(source.glob("*.safetensors")) if file != path)
    edit_header(other, lambda h: h.update({EXPERT: {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}}))
    refused(source, tmp_path / "s", CheckpointError, EXPERT, path.name, other.name, "both")


def test_weights_of_a_type_that_cannot_be_read(source: Path, tmp_path: Path) -> None:
    path = shard_of(source, EXPERT)
    edit_header(path, lambda header: header[EXPERT].update(dtype="I8"))
    refused(source, tmp_path / "s", CheckpointError, EXPERT, path.name, "int8", "FP8")


def test_index_that_leaves_the_folder(source: Path, tmp_path: Path) -> None:
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][EXPERT] = "../secret.safetensors"
    index.write_text(json.dumps(content))
    refused(source, tmp_path / "s", CheckpointError, "../secret.safetensors")
    index.write_text("{}")
    refused(source, tmp_path / "s", CheckpointError, "weight_map")
    index.write_text("{")
    refused(source, tmp_path / "s", CheckpointError, "JSON")


def test_missing_tensor_scale_and_unknown_tensor(source: Path, tmp_path: Path) -> None:
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    scale = content["weight_map"].pop(f"{EXPERT}_scale_inv")
    index.write_text(json.dumps(content))
    refused(source, tmp_path / "s", CheckpointError, f"{EXPERT}_scale_inv", "missing")
    content["weight_map"][f"{EXPERT}_scale_inv"] = scale
    norm = content["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(content))
    refused(source, tmp_path / "s", CheckpointError, "model.norm.weight")
    content["weight_map"]["model.norm.weight"] = norm
    index.write_text(json.dumps(content))
    edit_header(source / norm, lambda header: header.update(__metadata__={"format": "pt"}))
    assert convert(source, tmp_path / "s", dry_run=True).to_dict()["fits"]


def test_a_tensor_of_unknown_meaning_is_refused(source: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.indexer.wk.weight"
    path = shard_of(source, EXPERT)
    entry = {"dtype": "BF16", "shape": [0, 256], "data_offsets": [0, 0]}
    edit_header(path, lambda header: header.update({name: entry}))
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][name] = path.name
    index.write_text(json.dumps(content))
    refused(source, tmp_path / "s", CheckpointError, name, path.name, "not part of the model")


def test_wrong_shapes(source: Path, tmp_path: Path) -> None:
    path = shard_of(source, f"{EXPERT}_scale_inv")
    edit_header(path, lambda header: header[f"{EXPERT}_scale_inv"].update(shape=[4, 1]))
    refused(source, tmp_path / "s", CheckpointError, f"{EXPERT}_scale_inv", "[4, 1]", "[2, 2]", "128x128")
    edit_header(path, lambda header: header[f"{EXPERT}_scale_inv"].update(shape=[2, 2]))
    path = shard_of(source, EXPERT)
    edit_header(path, lambda header: header[EXPERT].update(shape=[256, 160]))
    refused(source, tmp_path / "s", CheckpointError, EXPERT, "[256, 160]", "[160, 256]")


@pytest.mark.parametrize("experts", ["int4-g32", "fp8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scale_that_is_no_number(source: Path, tmp_path: Path, experts: str, value: float) -> None:
    patch_tensor(source, f"{EXPERT}_scale_inv", np.float32(value).tobytes(), at=4)
    told = f"{EXPERT}_scale_inv", "1 of 4", "NaN", ".safetensors: "
    refused(source, tmp_path / "s", CheckpointError, *told, experts=experts)
    assert not (tmp_path / "s" / "expertpager.json").exists()


@pytest.mark.parametrize("experts", ["int4-g32", "fp8", "bf16", "int8-g128", "nf4-b64", "int3-g32", "int2-g32"])
def test_weight_that_is_no_number(source: Path, tmp_path: Path, experts: str) -> None:
    patch_tensor(source, EXPERT, b"\x7f", at=77)
    refused(source, tmp_path / "s", CheckpointError, EXPERT, "NaN", ".safetensors: ", experts=experts)


def test_norm_that_is_no_number(source: Path, tmp_path: Path) -> None:
    patch_tensor(source, "model.norm.weight", b"\xc0\x7f")
    refused(source, tmp_path / "s", CheckpointError, "model.norm.weight", "NaN")


def test_unknown_options(source: Path, tmp_path: Path) -> None:
    refused(source, tmp_path / "s", CodecError, "int5-g7", "int4-g32", experts="int5-g7")
    refused(source, tmp_path / "s", CodecError, "q4", resident="q4")
    refused(source, tmp_path / "s", UsageError, "best", "rtn", scales="best")
    refused(source, tmp_path / "s", UsageError, "workers", workers=0)
    refused(source, source, UsageError, "source itself")
    assert not (tmp_path / "s").exists()


def test_unknown_model(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "deepseek_v4"}))
    refused(source, tmp_path / "s", ConfigError, "deepseek_v4")
    (source / "config.json").unlink()
    refused(source, tmp_path / "s", CheckpointError, "config.json")


def test_a_store_is_no_source(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "s")
    refused(tmp_path / "s", tmp_path / "t", CheckpointError, "quantized already", "compressed-tensors")


def test_no_source(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere" / "at" / "all", tmp_path / "s", CheckpointError, "neither a folder nor")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "s", CheckpointError, "config.json")


def test_not_enough_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "free_nbytes", lambda directory: 1 << 20)
    refused(source, tmp_path / "s", BudgetError, "1.0 MiB free", "bytes are missing")
    assert not list((tmp_path / "s").glob("*.safetensors*"))
    assert not convert(source, tmp_path / "s", dry_run=True).to_dict()["fits"]
    monkeypatch.undo()
    convert(source, tmp_path / "s")
    assert verify(tmp_path / "s").ok


def test_disk_full_while_writing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(source, tmp_path / "whole")
    pwrite, written = os.pwrite, 0

    def full_disk(fd: int, data: Any, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > 900_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full_disk)
    refused(source, tmp_path / "s", BudgetError, "disk full", "run the same command again")
    monkeypatch.undo()
    assert not (tmp_path / "s" / "expertpager.json").exists()
    report = convert(source, tmp_path / "s")
    assert digests(tmp_path / "s") == digests(tmp_path / "whole")
    assert not report.to_dict().get("dry_run")


def test_a_finished_store_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "s")
    before = digests(tmp_path / "s")
    assert "nothing to do" in convert(source, tmp_path / "s").lines()[0]
    refused(source, tmp_path / "s", StoreError, "experts", "int4-g32", "fp8", experts="fp8")
    other = write_checkpoint(tmp_path / "other", seed=9, **SMALL)
    refused(other, tmp_path / "s", StoreError, "source revision")
    assert digests(tmp_path / "s") == before


def test_foreign_folders_are_left_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    refused(source, out, StoreError, "thesis.txt")
    assert (out / "thesis.txt").read_text() == "years of work"
    refused(source, out / "thesis.txt", StoreError, "is a file")


def test_not_a_store_and_newer_store(source: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not a finished store"):
        Store.open(source)
    convert(source, tmp_path / "s")
    path = tmp_path / "s" / "expertpager.json"
    newer = json.loads(path.read_text()) | {"format_version": 99}
    path.write_text(json.dumps(newer))
    with pytest.raises(StoreError, match=r"99.*newer"):
        Store.open(tmp_path / "s")
    refused(source, tmp_path / "s", StoreError, "99", "newer")
