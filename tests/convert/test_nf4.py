"""NF4 stores: bitsandbytes reads the bytes of a store as they are, and sees the weights that we see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, digests
from safetensors import safe_open

import offload
from convert.dry_run import DryRun
from convert.encoder import ReferenceEncoder
from convert.inspect import inspect
from convert.pipeline import convert
from convert.synthetic import TINY_CONFIG, write_checkpoint
from convert.verify import verify
from offload.errors import CheckpointError
from offload.quant import get_codec
from offload.store import Store
from offload.types import PROJECTIONS, ExpertId

bitsandbytes = pytest.importorskip("bitsandbytes")

TRIED = "5.23.0"
"""The version of transformers that the tests are installed with."""

WHOLE_BLOCKS: dict[str, Any] = {
    **{"moe_intermediate_size": 128, "intermediate_size": 384, "q_lora_rank": 128, "kv_lora_rank": 128},
    **{"qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "num_hidden_layers": 2, "n_routed_experts": 4},
    **{"num_experts_per_tok": 2, "n_group": 2},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("nf4")
    source = write_checkpoint(folder / "c", TINY_CONFIG, seed=2, **WHOLE_BLOCKS)
    convert(source, folder / "s", experts="nf4-b64", resident="nf4-b64")
    return Store.open(folder / "s")


def stored(store: Store, file: str, module: str) -> Any:
    """The weight `module` as bitsandbytes reads it: the tensors of the file, by their names, and nothing else."""
    with safe_open(store.path / file, framework="pt") as shard:
        names = [name for name in shard.keys() if name.startswith(f"{module}.weight.")]  # noqa: SIM118
        statistics = {name: shard.get_tensor(name) for name in names}
        data = shard.get_tensor(f"{module}.weight")
    return bitsandbytes.nn.Params4bit.from_prequantized(data, statistics, device="cpu")


def modules(store: Store) -> list[tuple[str, str, Any]]:
    """(file, module, our view of its weight) of every expert's matrices and every resident NF4 matrix."""
    found = []
    for expert in range(4):
        extent = store.locate(ExpertId(1, expert))
        raw = extent.path.read_bytes()[extent.offset : extent.offset + extent.nbytes]
        views = store.layout.views(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
        for projection in PROJECTIONS:
            module = f"model.layers.1.mlp.experts.{expert}.{projection}"
            found.append((extent.path.name, module, views.projections[projection]))
    for name, codec in store.manifest.resident_codecs.items():
        if codec == "nf4-b64":
            layer = int(name.split(".")[2])
            found.append((f"model-layer-{layer:05d}-resident.safetensors", name, store.resident(name)))
    return found


def test_bitsandbytes_reads_every_matrix_bit_for_bit(store: Store) -> None:
    found = modules(store)
    assert len(found) == 12 + 14 + 2
    for file, module, ours in found:
        theirs = stored(store, file, module)
        assert theirs.quant_state.dtype == torch.bfloat16 and tuple(theirs.quant_state.shape) == (ours.rows, ours.cols)
        decoded = bitsandbytes.functional.dequantize_4bit(theirs.data, theirs.quant_state)
        assert decoded.dtype == torch.bfloat16
        assert torch.equal(decoded, ours.dequantize()), module
        theirs.quant_state.dtype = torch.float32
        decoded = bitsandbytes.functional.dequantize_4bit(theirs.data, theirs.quant_state)
        assert torch.equal(decoded, ours.dequantize(torch.float32)), module


@pytest.mark.parametrize("tokens", [1, 5])
def test_its_matrix_product_is_ours(store: Store, tokens: int) -> None:
    from offload.kernels import select

    kernels = select("reference")
    generator = torch.Generator().manual_seed(tokens)
    for file, module, ours in modules(store)[:3]:
        theirs = stored(store, file, module)
        x = torch.randn(tokens, ours.cols, generator=generator).to(torch.bfloat16)
        got = bitsandbytes.matmul_4bit(x, theirs.data.t(), quant_state=theirs.quant_state).float()
        expected = kernels.linear(x.float(), ours)
        # It multiplies in bf16 and rounds the result to bf16.
        assert ((got - expected).abs() <= 2**-7 * (x.float().abs() @ ours.dequantize().float().abs().T)).all()
        assert float((got - expected).norm() / expected.norm()) < 0.01


def test_transformers_reads_the_resident_part_and_refuses_the_experts(store: Store) -> None:
    """Version 5 fuses experts into one tensor, which it does not read from NF4: an error, not a model of noise."""
    transformers = pytest.importorskip("transformers")
    if transformers.__version__ != TRIED:
        pytest.skip(f"what becomes of packed experts depends on the version; known of {TRIED}")
    load = transformers.AutoModelForCausalLM.from_pretrained
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(store.path)
    model, report = load(store.path, output_loading_info=True, ignore_mismatched_sizes=True)
    assert {name for name, *_ in report["mismatched_keys"]} == {
        f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")
    }
    for module, codec in store.manifest.resident_codecs.items():
        weight = model.get_submodule(module).weight
        if codec == "nf4-b64":
            weight = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(weight.to(torch.bfloat16), store.resident(module).dequantize()), module


def test_beside_other_formats_no_engine_is_promised_anything(checkpoint: Path, tmp_path: Path) -> None:
    report = convert(checkpoint, tmp_path / "s", experts="nf4-b64", dry_run=True)
    assert isinstance(report, DryRun)
    assert report.plan.store_config["quantization_config"]["quant_method"] == "expertpager"
    assert any("no other engine" in line for line in report.lines())
    convert(checkpoint, tmp_path / "s", experts="nf4-b64", workers=3)
    convert(checkpoint, tmp_path / "again", experts="nf4-b64", workers=1)
    assert digests(tmp_path / "s") == digests(tmp_path / "again")
    seen = inspect(tmp_path / "s")
    assert seen.components["routed experts"].codecs == {"nf4-b64"}
    assert "quant_method in config.json: expertpager" in seen.lines()
    with offload.load(tmp_path / "s", kernels="reference") as engine:
        assert torch.isfinite(engine.logits([3, 1, 4])).all()
    with pytest.raises(CheckpointError, match="quantized already"):
        convert(tmp_path / "s", tmp_path / "t")


def test_damage_is_found_and_repaired(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "s", experts="nf4-b64")
    before = digests(tmp_path / "s")
    file = tmp_path / "s" / "model-layer-00001-experts.safetensors"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 16  # an expert
    raw[-3] ^= 1  # the constant tensors behind the last one
    file.write_bytes(raw)
    found = {damage.tensor for damage in verify(tmp_path / "s").damages}
    assert found == {None, "weight.quant_map, weight.quant_state.bitsandbytes__nf4"}
    assert verify(tmp_path / "s", source=str(checkpoint), sample=1, repair=True).ok
    assert digests(tmp_path / "s") == before


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 31), (130, 257), (64, 96), (5, 64)])
def test_strips_of_rows_and_odd_sizes(rows: int, cols: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes and scales run on from row to row; any size reads back as bitsandbytes reads it."""
    monkeypatch.setattr("convert.encoder._STRIP", 1)
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)) * 1e-3
    codec = get_codec("nf4-b64")
    parts = ReferenceEncoder().encode(weight, None, (128, 128), codec, "rtn").parts
    codes, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(parts["weight"], codes)
    assert torch.equal(parts["weight.absmax"], state.absmax)
    decoded = codec.decode(parts, rows, cols, torch.float32)
    state.shape = torch.Size([rows * cols])  # its AVX-512 code takes blocks to begin anew with every row
    assert torch.equal(decoded, bitsandbytes.functional.dequantize_4bit(codes, state).view(rows, cols))
    ids = torch.tensor([rows - 1, 0])
    assert torch.equal(codec.rows_of(parts, rows, cols, ids), decoded[ids].to(torch.bfloat16))


def test_sizes_of_the_small_checkpoint(tmp_path: Path) -> None:
    """Blocks run over row ends where columns are no multiple of 64: valid here, and said to be so."""
    source = write_checkpoint(tmp_path / "c", **SMALL)
    report = convert(source, tmp_path / "s", experts="nf4-b64", dry_run=True)
    assert isinstance(report, DryRun)
    assert any("no multiples of the group" in line for line in report.lines())
