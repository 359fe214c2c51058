"""The multi-token-prediction layer: kept on request in the layout of all layers, without effect on the answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL, digests
from safetensors import safe_open
from safetensors.torch import save_file

from convert.dry_run import DryRun
from convert.footprint import footprints
from convert.inspect import inspect
from convert.pipeline import convert
from convert.synthetic import write_checkpoint
from convert.verify import verify
from offload.engine.engine import Engine
from offload.engine.options import RuntimeOptions
from offload.errors import CheckpointError, StoreError
from offload.store import Store
from offload.tiers.simulated import SimulatedDevice
from offload.types import ExpertId

LAYER = 3  # of the shared checkpoint: the one behind its last


@pytest.fixture(scope="module")
def stores(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The checkpoint with and without its multi-token-prediction layer."""
    folder = tmp_path_factory.mktemp("mtp")
    convert(checkpoint, folder / "with", mtp=True, head="int8-g128")
    convert(checkpoint, folder / "without", head="int8-g128")
    return folder / "with", folder / "without"


def source_tensor(checkpoint: Path, name: str) -> torch.Tensor:
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(checkpoint / index[name], framework="pt") as shard:
        return shard.get_tensor(name)


def test_every_tensor_of_the_layer_is_kept(checkpoint: Path, stores: tuple[Path, Path]) -> None:
    store = Store.open(stores[0])
    prefix = f"model.layers.{LAYER}"
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    kept = json.loads((stores[0] / "model.safetensors.index.json").read_text())["weight_map"]
    modules = {name.rsplit(".", 1)[0] for name in index if name.startswith(prefix)}
    assert len(modules) > 30 and modules == {name.rsplit(".", 1)[0] for name in kept if name.startswith(prefix)}
    for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight", "mlp.gate.e_score_correction_bias"):
        assert torch.equal(store.tensor(f"{prefix}.{name}"), source_tensor(checkpoint, f"{prefix}.{name}"))
    for name, codec in (("eh_proj", "bf16"), ("embed_tokens", "bf16"), ("shared_head.head", "int8-g128")):
        assert store.codec_name(f"{prefix}.{name}") == codec
        error = store.resident(f"{prefix}.{name}").dequantize() - source_tensor(checkpoint, f"{prefix}.{name}.weight")
        assert float(error.norm()) <= (0.0 if codec == "bf16" else 0.02) * float(error.numel()) ** 0.5
    extent = store.locate(ExpertId(LAYER, 5))
    assert (extent.path.name, extent.nbytes) == (f"model-layer-{LAYER:05d}-experts.safetensors", store.layout.stride)
    assert store.hf_config["num_nextn_predict_layers"] == 1
    assert store.config.moe_layers == range(1, LAYER)


@pytest.mark.parametrize("count", [0, 1])
def test_the_rest_of_the_store_and_the_answers_are_the_same(stores: tuple[Path, Path], count: int) -> None:
    ours, plain = (digests(path) for path in stores)
    layer = {name for name in ours if f"{LAYER:05d}" in name}
    assert len(layer) == 2
    texts = {"config.json", "model.safetensors.index.json", "expertpager.json", "expertpager.json.bak"}
    assert {name for name in ours if ours[name] != plain.get(name)} == layer | texts
    logits = []
    for path in stores:
        devices = [SimulatedDevice() for _ in range(count)]
        with Engine(path, RuntimeOptions(kernels="reference", context=64, usage="off"), devices) as engine:
            logits.append(engine.logits([3, 1, 4, 1, 5]))
    assert torch.equal(*logits)
    assert Store.open(stores[0]).resident_nbytes == Store.open(stores[1]).resident_nbytes


def test_it_is_counted(checkpoint: Path, stores: tuple[Path, Path], tmp_path: Path) -> None:
    ours, plain, source = inspect(stores[0]), inspect(stores[1]), inspect(checkpoint)
    assert ours.components["MTP"].parameters == source.components["MTP"].parameters > 0
    assert ours.components["MTP"].nbytes > 0 == plain.components["MTP"].nbytes
    assert ours.parameters == plain.parameters == source.parameters
    assert any(line.startswith("MTP") for line in ours.lines())
    report = convert(checkpoint, tmp_path / "s", dry_run=True, mtp=True, head="int8-g128")
    assert isinstance(report, DryRun)
    assert len(report.plan.mapped.experts) == 3 * SMALL["n_routed_experts"]
    assert any("kept: multi-token-prediction layer 3" in line for line in report.lines())
    for name, size in report.plan.file_sizes.items():
        assert (stores[0] / name).stat().st_size == size
    left_out = convert(checkpoint, tmp_path / "s", dry_run=True)
    assert isinstance(left_out, DryRun)
    assert any("left out" in line and "--mtp keeps them" in line for line in left_out.lines())
    (item,), (other,) = footprints(stores[0]).items, footprints(stores[1]).items
    assert item.resident_nbytes == other.resident_nbytes and item.store_nbytes > other.store_nbytes


def test_damage_in_it_is_named_and_repaired(checkpoint: Path, stores: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(stores[0], tmp_path / "s")
    before = digests(tmp_path / "s")
    for name in (f"model-layer-{LAYER:05d}-experts.safetensors", f"model-layer-{LAYER:05d}-resident.safetensors"):
        raw = bytearray((tmp_path / "s" / name).read_bytes())
        raw[len(raw) // 2] ^= 1
        (tmp_path / "s" / name).write_bytes(raw)
    damages = verify(tmp_path / "s").damages
    assert len(damages) == 2 and {damage.expert.layer for damage in damages if damage.expert} == {LAYER}
    assert verify(tmp_path / "s", source=str(checkpoint), sample=1, repair=True).ok
    assert digests(tmp_path / "s") == before


def test_with_and_without_do_not_mix(checkpoint: Path, stores: tuple[Path, Path]) -> None:
    with pytest.raises(StoreError, match="mtp True, not False"):
        convert(checkpoint, stores[0], head="int8-g128")


def test_a_checkpoint_without_the_layer_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "c", **SMALL)
    with pytest.raises(CheckpointError, match="has no multi-token-prediction layer"):
        convert(source, tmp_path / "s", mtp=True)


def test_a_missing_tensor_is_named_but_copies_may_be_left_out(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "c", mtp=True, shards=1, **SMALL)
    shard = next(source.glob("*.safetensors"))
    index = json.loads((source / "model.safetensors.index.json").read_text())

    def drop(name: str) -> None:
        with safe_open(shard, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys() if key != name}  # noqa: SIM118
        save_file(tensors, shard)
        del index["weight_map"][name]
        (source / "model.safetensors.index.json").write_text(json.dumps(index))

    drop(f"model.layers.{LAYER}.embed_tokens.weight")
    drop(f"model.layers.{LAYER}.shared_head.head.weight")
    convert(source, tmp_path / "s", mtp=True)
    assert verify(tmp_path / "s").ok
    assert inspect(tmp_path / "s").components["MTP"].parameters > 0
    drop(f"model.layers.{LAYER}.hnorm.weight")
    with pytest.raises(CheckpointError, match="hnorm"):
        convert(source, tmp_path / "t", mtp=True)
