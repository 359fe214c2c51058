"""Header listings: plans as from the checkpoint, the shipped one is DeepSeek-V3's, damage is refused."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest
from click.testing import CliRunner

import cli
from convert import convert
from convert.footprint import footprints
from convert.listing import load_listing, save_listing, shipped_listing
from convert.source import Checkpoint, LocalSource
from convert.synthetic import write_checkpoint
from offload.errors import CheckpointError, UsageError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("listing") / "checkpoint"
    write_checkpoint(path)
    return path


def test_a_listing_plans_like_its_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.json.xz"
    done = CliRunner().invoke(cli.cli, ["inspect", str(checkpoint), "--listing", str(file)])
    assert done.exit_code == 0, done.output
    assert footprints(file).items == footprints(checkpoint).items
    assert footprints(file).kind == "header listing"
    source = Checkpoint(LocalSource(checkpoint))
    theirs = {name: (info.dtype, info.shape) for name, info in source.tensors.items()}
    ours = Checkpoint(load_listing(file)).tensors
    assert {name: (info.dtype, info.shape) for name, info in ours.items()} == theirs


def test_weights_cannot_come_from_a_listing(checkpoint: Path, tmp_path: Path) -> None:
    file = save_listing(Checkpoint(LocalSource(checkpoint)), tmp_path / "tiny.json.xz")
    with pytest.raises(CheckpointError, match="holds no weights"):
        convert(file, tmp_path / "store")


def test_shipped_repositories_need_no_network() -> None:
    assert shipped_listing("deepseek-ai/DeepSeek-V3") is not None and shipped_listing("nobody/nothing") is None
    found = footprints("deepseek-ai/DeepSeek-R1", recipes=["int4"])
    assert found.name == "deepseek-ai/DeepSeek-R1" and found.kind == "header listing"
    assert found.items[0].config.num_hidden_layers == 61


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not xz", "no header listing"),
        (lzma.compress(b"[1]"), "lacks"),
        (lzma.compress(b'{"format": "expertpager-listing", "name": "x", "config": {}}'), "tensors"),
        (
            lzma.compress(b'{"format": "expertpager-listing", "name": "x", "config": {}, "tensors": {"a": ["Q9", 2]}}'),
            "unknown dtype Q9",
        ),
    ],
)
def test_damaged_listings_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "bad.json.xz"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_listing(file)


def test_another_suffix_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.json\.xz"):
        save_listing(Checkpoint(LocalSource(checkpoint)), tmp_path / "list.json")
