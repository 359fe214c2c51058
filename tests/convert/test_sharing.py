"""Several processes convert one store together: the same bytes, nothing done twice, nobody's death in the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import digests

from convert import journal
from convert.journal import FOLDER
from convert.pipeline import convert
from convert.selection import format_layers, parse_layers
from offload.errors import StoreError, UsageError

ROOT = Path(__file__).parents[2]

# A run that stops for good, with its claims held, after so many steps.
HANGING = """
import sys, time
from convert import committer
from convert.pipeline import convert
committer.COMMIT_ITEMS = 1
class Hang:
    steps = 0
    def __call__(self, label, done, total):
        self.steps += 1
        if self.steps == int(sys.argv[3]):
            print("hanging", flush=True)
            time.sleep(600)
    def note(self, line): pass
convert(sys.argv[1], sys.argv[2], workers=1, only_layers="all", progress=Hang())
"""


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "s"
    convert(checkpoint, out)
    return digests(out)


def command(*arguments: object) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "cli", *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def test_parts_make_the_whole(checkpoint: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    store = tmp_path / "s"
    first = convert(checkpoint, store, only_layers="1")
    values = first.to_dict()
    assert values["finished"] is False
    assert values["missing"] == [0, 2]
    assert values["experts"] == 8
    assert any("not finished yet: layers 0, 2" in line for line in first.lines())
    assert not (store / "expertpager.json").exists()
    again = convert(checkpoint, store, only_layers="1")
    assert again.to_dict()["source_bytes_read"] == 0
    assert convert(checkpoint, store, only_layers="0,2").to_dict()["finished"] is True
    assert digests(store) == whole


def test_a_whole_run_finishes_what_parts_have_begun(checkpoint: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    convert(checkpoint, tmp_path / "s", only_layers="2")
    assert convert(checkpoint, tmp_path / "s").to_dict()["experts_resumed"] == 8
    assert digests(tmp_path / "s") == whole


def test_processes_share_the_work(checkpoint: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    store = tmp_path / "s"
    runs = [command("convert", checkpoint, "-o", store, "--only-layers", "all", "--json") for _ in range(3)]
    results = [result(run) for run in runs]
    assert digests(store) == whole
    assert any(item["finished"] for item in results)
    total = convert(checkpoint, tmp_path / "t", dry_run=True).to_dict()["fetch_bytes"]
    assert sum(item["source_bytes_read"] for item in results) == total, "everything is read once"


@pytest.mark.parametrize("steps", [2, 6])
def test_the_work_of_the_dead_is_taken_over(
    checkpoint: Path, tmp_path: Path, whole: dict[str, str], steps: int
) -> None:
    store = tmp_path / "s"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    script = [sys.executable, "-c", HANGING, str(checkpoint), str(store), str(steps)]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True, env=env) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "hanging\n"
        with pytest.raises(StoreError, match=f"process {other.pid} on"):
            convert(checkpoint, store)
        report = convert(checkpoint, store, only_layers="all")
        assert report.missing, "what a living process has claimed is left to it"
        assert not (store / "expertpager.json").exists()
        other.send_signal(signal.SIGKILL)
    assert convert(checkpoint, store, only_layers="all").to_dict()["finished"]
    assert digests(store) == whole
    assert not (store / FOLDER).exists()


@pytest.mark.parametrize("moment", ["_take_lock", "_path"])
def test_the_store_is_finished_while_another_run_begins(
    checkpoint: Path, tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    store = tmp_path / "s"
    convert(checkpoint, store, only_layers="0")
    original = getattr(journal, moment)

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.undo()
        result = original(*arguments)
        convert(checkpoint, store, only_layers="all")
        return result

    monkeypatch.setattr(journal, moment, meanwhile)
    assert convert(checkpoint, store, only_layers="all").to_dict()["finished"]
    assert digests(store) == whole


def test_what_no_run_can_do(checkpoint: Path, tmp_path: Path) -> None:
    for text in ("3", "0-3", "2-1", "a", "", "1,,2", "-1"):
        with pytest.raises(UsageError, match="--only-layers"):
            convert(checkpoint, tmp_path / "s", only_layers=text)
    with pytest.raises(UsageError, match="leave out --only-layers"):
        convert(checkpoint, tmp_path / "s", only_layers="all", delete_source=True)
    convert(checkpoint, tmp_path / "s", only_layers="1")
    with pytest.raises(StoreError, match="experts int4-g32, now it is fp8"):
        convert(checkpoint, tmp_path / "s", only_layers="2", experts="fp8")


def test_choices_of_layers() -> None:
    layers = list(range(61))
    assert parse_layers("all", layers) == layers
    assert parse_layers(" 3, 7,58-60 ", layers) == [3, 7, 58, 59, 60]
    assert format_layers([0, 1, 2, 7, 60, 59]) == "0-2, 7, 59-60"


def kill(checkpoint: Path, folder: Path, kills: int, seed: int) -> None:
    script = [sys.executable, str(Path(__file__).parent / "killing.py"), str(checkpoint), str(folder)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*script, str(kills), str(seed), "3"], capture_output=True, text=True, env=env, check=False, timeout=3000
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["kills"] >= kills


def test_sharing_processes_killed_at_random_instants(checkpoint: Path, tmp_path: Path) -> None:
    kill(checkpoint, tmp_path, 12, seed=5)


@pytest.mark.slow
def test_sharing_processes_killed_at_200_random_instants(checkpoint: Path, tmp_path: Path) -> None:
    kill(checkpoint, tmp_path, 200, seed=6)
