"""Every flipped or missing byte is found and named; repair restores the identical bytes and touches nothing else."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from pathlib import Path

import pytest
from conftest import SMALL, digests

from convert.pipeline import convert
from convert.synthetic import write_checkpoint
from convert.verify import verify
from offload.errors import OffloadError, StoreError, UsageError
from offload.types import ExpertId


@pytest.fixture(scope="module")
def pristine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("store") / "s"
    convert(checkpoint, store)
    return store


@pytest.fixture
def store(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "store")


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def test_a_sound_store(store: Path, checkpoint: Path) -> None:
    report = verify(store)
    assert report.ok
    assert report.experts == 16
    assert "sound" in report.lines()[-1]
    total = sum(p.stat().st_size for p in store.iterdir() if not p.name.startswith("expertpager.json"))
    assert report.nbytes == total, "every byte outside the self-checking manifests must have been read"
    assert verify(store, source=checkpoint).derived == 16
    assert verify(store, source=checkpoint, sample=3).derived == 3


def test_random_flips_are_found_named_and_repaired(store: Path, checkpoint: Path) -> None:
    before = digests(store)
    rng = random.Random(7)
    files = sorted(store.iterdir())
    sizes = [path.stat().st_size for path in files]
    for turn in range(40):
        # Half of the flips by size (experts), half over all files alike (headers, texts, manifests).
        path = rng.choices(files, sizes)[0] if turn % 2 else rng.choice(files)
        flip(path, rng.randrange(path.stat().st_size), rng.randrange(8))
        report = verify(store)
        assert [damage.file for damage in report.damages] == [path.name]
        assert verify(store, source=checkpoint, repair=True).ok
        assert digests(store) == before


def test_manifests_restore_each_other_without_a_source(store: Path) -> None:
    before = digests(store)
    for name in ("expertpager.json", "expertpager.json.bak"):
        flip(store / name, 500, 3)
        assert [str(damage) for damage in verify(store).damages] == [f"{name}: damaged"]
        assert verify(store, repair=True).ok
        assert digests(store) == before
    for name in ("expertpager.json", "expertpager.json.bak"):
        flip(store / name, 500, 3)
    with pytest.raises(StoreError, match="damaged"):
        verify(store, repair=True)


def name_of(path: Path, at: int) -> str:
    """What the byte `at` of a store's file belongs to, by the file's own header: expert, tensor, header or ""."""
    if path.suffix != ".safetensors":
        return ""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    if at < start:
        return "header"
    entries = json.loads(data[8:start])
    entries.pop("__metadata__")
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        if begin <= at - start < end:
            expert = re.match(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.", name)
            if expert is None:
                return str(name)
            return "weight_shape" if name.endswith("weight_shape") else f"expert {expert[2]} of layer {expert[1]}"
    raise AssertionError("a byte of no tensor")


@pytest.mark.slow
def test_1000_flips(store: Path, checkpoint: Path) -> None:
    """Each is found, names its expert or tensor, and is repaired to the original bytes."""
    before = digests(store)
    rng = random.Random(11)
    files = sorted(store.iterdir())
    sizes = [path.stat().st_size for path in files]
    for turn in range(1000):
        # Half of the flips by size (experts), half over all files alike (headers, texts, manifests).
        path = rng.choices(files, sizes)[0] if turn % 2 else rng.choice(files)
        at = rng.randrange(path.stat().st_size)
        name = name_of(path, at)
        flip(path, at, rng.randrange(8))
        (damage,) = verify(store).damages
        assert damage.file == path.name
        assert name in str(damage)
        repaired = verify(store, source=checkpoint, repair=True)
        assert repaired.ok
        assert [str(item) for item in repaired.repaired] == [str(damage)]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == before[path.name]
    assert digests(store) == before


def test_damage_is_named(store: Path) -> None:
    name = "model-layer-00002-experts.safetensors"
    size = (store / name).stat().st_size
    flip(store / name, size // 2)
    flip(store / name, 100)
    flip(store / name, size - 1)
    flip(store / "model-resident.safetensors", (store / "model-resident.safetensors").stat().st_size - 1)
    damages = verify(store).damages
    assert {(d.file, d.tensor, d.expert) for d in damages} == {
        (name, "header", None),
        (name, "weight_shape", None),
        (name, None, ExpertId(2, 3)),
        ("model-resident.safetensors", "model.norm.weight", None),
    }
    assert any("expert 3 of layer 2" in line for line in verify(store).lines())
    assert verify(store).to_dict()["ok"] is False


@pytest.mark.parametrize("what", ["delete", "cut", "grow"])
def test_missing_and_resized_files(store: Path, checkpoint: Path, what: str) -> None:
    before = digests(store)
    for name in before:
        if what == "delete":
            (store / name).unlink()
        elif what == "cut":
            with (store / name).open("r+b") as file:
                file.truncate(max(1, (store / name).stat().st_size - 1000))
        else:
            with (store / name).open("ab") as file:
                file.write(b"\0" * 10)
        report = verify(store)
        assert {damage.file for damage in report.damages} == {name}
        assert verify(store, source=checkpoint, repair=True).ok
        assert digests(store) == before, name


def test_only_the_damaged_expert_is_written(store: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import convert.repair as repairing

    derived = []
    original = repairing.Origin.expert
    monkeypatch.setattr(repairing.Origin, "expert", lambda self, e: (derived.append(e), original(self, e))[1])
    name = "model-layer-00001-experts.safetensors"
    flip(store / name, (store / name).stat().st_size // 2)
    report = verify(store, source=checkpoint, repair=True)
    assert derived == [ExpertId(1, 3)]
    assert [damage.expert for damage in report.repaired] == [ExpertId(1, 3)]


def test_a_foreign_source_is_refused(store: Path, checkpoint: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", seed=2, shards=3, scatter=True, mtp=True, tokenizer=True, **SMALL)
    name = "model-layer-00001-experts.safetensors"
    flip(store / name, (store / name).stat().st_size // 2)
    before = digests(store)
    with pytest.raises(StoreError, match="not what this store was made of"):
        verify(store, source=other, repair=True)
    with pytest.raises(UsageError, match="--source"):
        verify(store, repair=True)
    assert digests(store) == before


def test_a_store_that_differs_from_its_source_is_found(store: Path, checkpoint: Path) -> None:
    """Not damage of the disk: the manifest agrees, but the source gives other weights."""
    from convert.plan import MANIFEST_COPY
    from offload.store.manifest import MANIFEST_NAME, Manifest

    text = Manifest.load(store).dump()
    manifest = Manifest.parse(text.encode(), store)
    wrong = manifest.layers[1].experts[2]
    layers = dict(manifest.layers)
    layers[1] = type(layers[1])(
        header=layers[1].header,
        tail=layers[1].tail,
        experts=("0" * len(wrong), *layers[1].experts[1:]),
        errors=layers[1].errors,
    )
    changed = Manifest(
        manifest.source, manifest.recipe, manifest.resident_codecs, layers, manifest.tensors, manifest.files
    )
    for name in (MANIFEST_NAME, MANIFEST_COPY):
        (store / name).write_text(changed.dump())
    damages = verify(store, source=checkpoint).damages
    assert {damage.expert for damage in damages} == {ExpertId(1, 0)}
    assert any("source" in damage.reason for damage in damages)


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(OffloadError, match="not a finished store"):
        verify(tmp_path)
    with pytest.raises(OffloadError, match="no such directory"):
        verify(tmp_path / "nowhere")
