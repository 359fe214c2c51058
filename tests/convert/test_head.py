"""Head and embedding in codecs of their own: the same weights in the runtime, in strips, and after a repair."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import SMALL

import offload
from convert.dry_run import DryRun
from convert.pipeline import convert
from convert.synthetic import write_checkpoint
from convert.verify import verify
from offload.quant import get_codec
from offload.store import Store

PAIRS = [("int4-g32", "int8-g128"), ("int8-g128", "fp8"), ("fp8", "int4-g32"), ("bf16", "bf16")]


@pytest.mark.parametrize(("head", "embedding"), PAIRS)
def test_the_runtime_uses_the_decoded_weights(
    checkpoint: Path, tmp_path: Path, head: str, embedding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convert.encode._CHUNK", 60_000)  # many strips
    convert(checkpoint, tmp_path / "plain", resident="bf16")
    convert(checkpoint, tmp_path / "s", resident="bf16", head=head, embedding=embedding)
    plain, store = Store.open(tmp_path / "plain"), Store.open(tmp_path / "s")
    for module, name in (("lm_head", head), ("model.embed_tokens", embedding)):
        assert store.codec_name(module) == name
        source = plain.resident(module).dequantize()
        codec = get_codec(name)
        expected = codec.decode(codec.encode(source, "ls"), *source.shape)
        assert torch.equal(store.resident(module).dequantize(), expected)
        ids = torch.tensor([5, 0, source.shape[0] - 1, 5, 130])
        assert torch.equal(store.resident(module).rows_of(ids), expected[ids])
    with offload.load(tmp_path / "s", kernels="reference") as engine:
        logits = engine.logits([3, 1, 4, 1, 5])
    with offload.load(tmp_path / "plain", kernels="reference") as engine:
        weights = engine._model.weights
        for ours, module in ((weights.embed, "model.embed_tokens"), (weights.head, "lm_head")):
            ours.parts["weight"].copy_(store.resident(module).dequantize())
        assert torch.equal(engine.logits([3, 1, 4, 1, 5]), logits)


def test_a_flipped_bit_of_head_or_embedding_is_repaired(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "s", head="int4-g32", embedding="int8-g128")
    store = Store.open(tmp_path / "s")
    file = tmp_path / "s" / "model-resident.safetensors"
    good = file.read_bytes()
    for name in ("lm_head.weight_scale", "lm_head.weight_packed", "model.embed_tokens.weight_scale"):
        bad = bytearray(good)
        bad[store.resident_headers[file].tensors[name].offset + 33] ^= 4
        file.write_bytes(bad)
        report = verify(tmp_path / "s", source=str(checkpoint), sample=1, repair=True)
        assert report.ok and file.read_bytes() == good, name


def test_a_codec_that_cannot_hold_the_shape_is_reported(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "c", **SMALL, hidden_size=160)
    report = convert(source, tmp_path / "s", dry_run=True, head="int8-g128", resident="bf16")
    assert isinstance(report, DryRun)
    assert report.plan.resident_codecs["lm_head"] == "bf16"
    assert any("int8-g128 cannot hold" in line and "lm_head" in line for line in report.lines())
