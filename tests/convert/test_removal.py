"""--delete-source: a shard goes only when its content is safe, and an interrupted run goes on without it."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from conftest import SMALL, digests

from convert import committer, pipeline
from convert.pipeline import convert
from convert.synthetic import write_checkpoint
from offload.errors import BudgetError, CheckpointError, DiskError, StoreError, UsageError

# Layers first, so that shards become superfluous one after the other.
SHARDS = 6


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("original"), seed=1, shards=SHARDS, tokenizer=True, **SMALL)


@pytest.fixture(scope="module")
def expected(original: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    store = tmp_path_factory.mktemp("expected") / "s"
    # The folder's own name is recorded; give it that of the copies below.
    convert(shutil.copytree(original, store.parent / "source"), store)
    return digests(store)


@pytest.fixture
def source(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "source")


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


class Counter:
    """Remembers how many shards were there at every step, and presses Ctrl-C when `stop` are left."""

    def __init__(self, folder: Path, stop: int = -1) -> None:
        self.folder, self.stop = folder, stop
        self.left: list[int] = []
        self.notes: list[str] = []

    def __call__(self, label: str, done: int, total: int) -> None:
        time.sleep(0.005)  # shards are deleted by another thread, and nobody waits for it
        self.left.append(len(shards(self.folder)))
        if self.left[-1] <= self.stop:
            raise KeyboardInterrupt

    def note(self, line: str) -> None:
        self.notes.append(line)


@pytest.fixture(autouse=True)
def commit_every_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committer, "COMMIT_ITEMS", 1)


def test_shards_go_one_by_one(source: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    counter = Counter(source)
    convert(source, tmp_path / "s", delete_source=True, progress=counter)
    assert digests(tmp_path / "s") == expected
    assert shards(source) == []
    assert (source / "config.json").exists()
    assert len(set(counter.left)) > 3, "not all at the end"
    assert counter.left == sorted(counter.left, reverse=True)


@pytest.mark.parametrize("again", [True, False])
def test_an_interrupted_run_goes_on_with_what_is_left(
    source: Path, tmp_path: Path, expected: dict[str, str], again: bool
) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "s", delete_source=True, workers=1, progress=Counter(source, stop=SHARDS - 2))
    left = shards(source)
    assert 0 < len(left) < SHARDS
    convert(source, tmp_path / "s", delete_source=again)
    assert digests(tmp_path / "s") == expected
    assert shards(source) == ([] if again else left)


def test_the_rest_must_be_of_the_same_source(source: Path, original: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "s", delete_source=True, workers=1, progress=Counter(source, stop=SHARDS - 2))
    left = shards(source)[-1]
    other = write_checkpoint(tmp_path / "o", seed=2, shards=SHARDS, tokenizer=True, **SMALL)
    shutil.copy(other / left, source / left)
    with pytest.raises(StoreError, match=left):
        convert(source, tmp_path / "s")
    shutil.copy(original / left, source / left)
    # A lost record of something whose shard is gone is a clear line, never zeros.
    for path in (tmp_path / "s").glob("*resident.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match="was deleted with --delete-source"):
        convert(source, tmp_path / "s")


def test_less_disk_is_needed_than_for_the_whole_store(
    source: Path, tmp_path: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    need = convert(source, tmp_path / "s", dry_run=True).to_dict()["disk_bytes_needed"]
    monkeypatch.setattr(pipeline, "free_nbytes", lambda directory: need - 1)
    with pytest.raises(BudgetError, match="1 bytes are missing"):
        convert(source, tmp_path / "s")
    convert(source, tmp_path / "s", delete_source=True)
    assert digests(tmp_path / "s") == expected


def test_what_does_not_read_back_is_not_deleted(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from convert import removal

    monkeypatch.setattr(removal.RangeReader, "checksum", lambda *_: "0" * 32)
    with pytest.raises(DiskError, match="does not read back"):
        convert(source, tmp_path / "s", delete_source=True)
    assert len(shards(source)) == SHARDS


def test_shards_with_other_tensors_and_links_are_kept(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "mtp", shards=SHARDS, mtp=True, **SMALL)
    counter = Counter(source)
    convert(source, tmp_path / "s", delete_source=True, progress=counter)
    assert 0 < len(shards(source)) < SHARDS
    assert any("not deleted" in line for line in counter.notes)

    linked = tmp_path / "linked"
    linked.mkdir()
    whole = write_checkpoint(tmp_path / "whole", **SMALL)
    for path in whole.iterdir():
        os.symlink(path, linked / path.name)
    with pytest.raises(UsageError, match="is a link"):
        convert(linked, tmp_path / "t", delete_source=True)
    assert len(shards(whole)) == 2
