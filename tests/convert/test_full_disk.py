"""Disks that are full, small or strange: a clear line, and everything finished stays good."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL, digests

from convert.pipeline import convert
from convert.synthetic import write_checkpoint
from convert.verify import verify
from offload.errors import StoreError, UsageError

# Another program fills the disk in the middle of a conversion, and makes room again.
FULL_DISK = """
import json, os, shutil, sys
from pathlib import Path
from convert import committer
from convert.pipeline import convert
from offload.errors import BudgetError
committer.COMMIT_ITEMS = 1
source, disk = sys.argv[1], Path(sys.argv[2])
class Fill:
    steps = 0
    def __call__(self, label, done, total):
        self.steps += 1
        if self.steps == 5:
            with open(disk / "filler", "wb", buffering=0) as filler:
                for block in (1 << 20, 4096, 1):
                    try:
                        while True: filler.write(bytes(block))
                    except OSError: pass
    def note(self, line): pass
try:
    convert(source, disk / "s", workers=1, progress=Fill())
except BudgetError as fault:
    print(json.dumps(str(fault)))
os.unlink(disk / "filler")
print(json.dumps(convert(source, disk / "s").to_dict()))
shutil.copytree(disk / "s", sys.argv[3])
"""

SMALL_FILES = """
import resource, sys
from convert.pipeline import convert
from offload.errors import DiskError
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
try:
    convert(sys.argv[1], sys.argv[2])
except DiskError as fault:
    print(fault)
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
convert(sys.argv[1], sys.argv[2])
"""


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "s"
    convert(checkpoint, out)
    return digests(out)


def run(*command: object) -> list[str]:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def can_mount() -> bool:
    """Whether this user may mount a file system in a namespace of its own."""
    probe = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="mounting a small file system needs user namespaces")
def test_a_disk_that_fills_up(checkpoint: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "script.py").write_text(FULL_DISK)
    shell = 'mount -t tmpfs -o size=40m none "$0" && exec "$1" "$2" "$3" "$0" "$4"'
    lines = run(
        "unshare", "--map-root-user", "--mount", "sh", "-c", shell,
        disk, sys.executable, tmp_path / "script.py", checkpoint, tmp_path / "s",
    )  # fmt: skip
    fault, report = map(json.loads, lines)
    assert "disk full while writing model-layer-0000" in fault
    assert "run the same command again" in fault
    assert "bytes are missing in all" in fault and " 0 bytes are missing" not in fault
    assert report["source_bytes_read"] < convert(checkpoint, tmp_path / "t").to_dict()["source_bytes_read"]
    assert digests(tmp_path / "s") == whole


def test_a_limit_on_the_size_of_files(checkpoint: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    (line,) = run(sys.executable, "-c", SMALL_FILES, checkpoint, tmp_path / "s")
    assert "cannot be written: File too large" in line and str(tmp_path / "s") in line
    assert digests(tmp_path / "s") == whole


def test_strange_paths(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative, with spaces and other scripts; a cache's folder of links."""
    linked = tmp_path / "snap shots" / "模型 ü"
    linked.mkdir(parents=True)
    for path in checkpoint.iterdir():
        (linked / path.name).symlink_to(path)
    (tmp_path / "link").symlink_to(linked)
    monkeypatch.chdir(tmp_path)
    convert("link", "stores/наш склад", workers=64)
    assert verify("stores/наш склад", source=linked).ok
    (tmp_path / "again").symlink_to(linked)
    with pytest.raises(UsageError, match="is the source itself"):
        convert("link", "again")


@pytest.mark.parametrize("mask", [0o002, 0o077])
def test_files_have_the_mode_that_the_user_wants(checkpoint: Path, tmp_path: Path, mask: int) -> None:
    former = os.umask(mask)
    try:
        convert(checkpoint, tmp_path / "s", only_layers="1")  # so that the journal is still there
    finally:
        os.umask(former)
    files = [path for path in (tmp_path / "s").rglob("*") if path.is_file()]
    assert len(files) > 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~mask}


def test_a_store_inside_its_source(tmp_path: Path, whole: dict[str, str]) -> None:
    source = write_checkpoint(tmp_path / "fp8", shards=2, **SMALL)
    convert(source, source / "store")
    assert verify(source / "store", source=source).ok


def test_a_finished_store_that_lost_a_file(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "s")
    (tmp_path / "s" / "model-layer-00001-experts.safetensors").unlink()
    with pytest.raises(StoreError, match="model-layer-00001-experts.safetensors is missing; run .*verify --repair"):
        convert(checkpoint, tmp_path / "s")
