"""A conversion stopped at any instant goes on where it was and ends with the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, digests
from torch import Tensor

from convert import committer, pipeline, run, unit
from convert.encode import EncodedExpert
from convert.journal import FOLDER, Journal, Records, recorded
from convert.pipeline import convert
from convert.plan import ConversionPlan, ResidentFile
from convert.synthetic import write_checkpoint
from offload.errors import StoreError
from offload.store.layout import resident_file_name
from offload.types import ExpertId, ceil_div

UNITS = (None, 0, 1, 2)


class StopAfter:
    """A progress callback that presses Ctrl-C after some steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.notes: list[str] = []

    def __call__(self, label: str, done: int, total: int) -> None:
        self.steps -= 1
        if self.steps == 0:
            raise KeyboardInterrupt

    def note(self, line: str) -> None:
        self.notes.append(line)


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "s"
    convert(checkpoint, out)
    return digests(out)


@pytest.fixture
def interrupted(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A conversion stopped after eight of its items: four files of resident tensors and sixteen experts."""
    monkeypatch.setattr(committer, "COMMIT_ITEMS", 1)
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint, tmp_path / "s", workers=1, progress=StopAfter(8))
    monkeypatch.undo()
    assert (tmp_path / "s" / FOLDER).exists()
    return tmp_path / "s"


def test_finished_work_is_not_done_again(
    checkpoint: Path, interrupted: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    units = [recorded(interrupted, unit) for unit in UNITS]
    experts = {expert for unit in units for expert in unit.experts}
    files = {name for unit in units for name in unit.files}
    assert len(experts) + len(files) == 8 and experts and files
    loaded: list[ExpertId] = []
    written: list[str] = []
    load, encode = run.load_expert, unit.encode_resident
    monkeypatch.setattr(run, "load_expert", lambda plan, e: (loaded.append(e), load(plan, e))[1])
    monkeypatch.setattr(unit, "encode_resident", lambda plan, file: (written.append(file.name), encode(plan, file))[1])
    progress = StopAfter(-1)
    report = convert(checkpoint, interrupted, progress=progress)
    assert sorted(loaded) == [e for layer in (1, 2) for i in range(8) if (e := ExpertId(layer, i)) not in experts]
    assert sorted(written) == sorted({resident_file_name(unit) for unit in UNITS} - files)
    assert report.to_dict()["experts_resumed"] == len(experts)
    said = f"{len(experts)} of 16 experts and {len(files)} of 4 resident files"
    assert any(said in line for line in progress.notes)
    assert digests(interrupted) == whole


def test_experts_go_on_while_resident_tensors_wait(
    checkpoint: Path, tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resident tensors are done one at a time here: another worker has experts to encode meanwhile."""
    some = threading.Event()
    write, encode = unit.UnitWork.write_expert, unit.encode_resident

    def write_expert(work: unit.UnitWork, expert: ExpertId, encoded: EncodedExpert) -> Records:
        some.set()
        return write(work, expert, encoded)

    def encode_resident(plan: ConversionPlan, file: ResidentFile) -> Iterator[tuple[str, Iterator[Tensor]]]:
        assert some.wait(60)
        return encode(plan, file)

    monkeypatch.setattr(unit.UnitWork, "write_expert", write_expert)
    monkeypatch.setattr(unit, "encode_resident", encode_resident)
    convert(checkpoint, tmp_path / "s", workers=2)
    assert digests(tmp_path / "s") == whole


@pytest.mark.parametrize("damage", ["torn", "flipped", "gone"])
def test_a_damaged_journal_costs_work_not_bytes(
    checkpoint: Path, interrupted: Path, whole: dict[str, str], damage: str
) -> None:
    journal = interrupted / FOLDER / "layer-00001.jsonl"
    data = bytearray(journal.read_bytes())
    assert data.count(b"\n") >= 3
    if damage == "torn":
        journal.write_bytes(data[:-20])
    elif damage == "flipped":
        data[-150] ^= 4
        journal.write_bytes(data)
    else:
        journal.unlink()
    convert(checkpoint, interrupted)
    assert digests(interrupted) == whole


def test_a_folder_without_its_identity_is_refused(checkpoint: Path, interrupted: Path) -> None:
    identity = interrupted / FOLDER / "conversion.json"
    data = bytearray(identity.read_bytes())
    data[40] ^= 1
    identity.write_bytes(data)
    with pytest.raises(StoreError, match="damaged; delete the folder"):
        convert(checkpoint, interrupted)
    identity.unlink()
    with pytest.raises(StoreError, match="no conversion has begun"):
        convert(checkpoint, interrupted)


def test_nothing_is_left_among_files_of_somebody_else(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").touch()
    with pytest.raises(StoreError, match=r"holds 1 files that no conversion has begun \(the first is precious.txt\)"):
        convert(checkpoint, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_lost_files_are_written_again(checkpoint: Path, interrupted: Path, whole: dict[str, str]) -> None:
    for partial in interrupted.glob("*-experts.safetensors.partial"):
        partial.unlink()
    (interrupted / "model-resident.safetensors").unlink()
    convert(checkpoint, interrupted)
    assert digests(interrupted) == whole


def test_other_recipe_or_source_is_refused(checkpoint: Path, interrupted: Path, tmp_path: Path) -> None:
    before = digests_of_tree(interrupted)
    for options, words in (
        ({"experts": "fp8"}, "experts int4-g32, now it is fp8"),
        ({"resident": "bf16"}, "resident int8-g128, now it is bf16"),
        ({"scales": "rtn"}, "scales ls, now it is rtn"),
    ):
        with pytest.raises(StoreError, match=words):
            convert(checkpoint, interrupted, **options)
    other = write_checkpoint(tmp_path / "o", seed=5, shards=3, scatter=True, mtp=True, tokenizer=True, **SMALL)
    with pytest.raises(StoreError, match="source revision"):
        convert(other, interrupted)
    assert digests_of_tree(interrupted) == before


def test_other_format_version_is_refused(checkpoint: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "FORMAT_VERSION", 2)
    with pytest.raises(StoreError, match="store format 1, now it is 2"):
        convert(checkpoint, interrupted)


def test_two_runs_are_kept_apart(checkpoint: Path, interrupted: Path, whole: dict[str, str]) -> None:
    line = (interrupted / FOLDER / "conversion.json").read_text()
    identity: dict[str, Any] = json.loads(line.split(" ", 1)[1])
    for alone, layers in ((True, None), (True, "1"), (False, None)):
        journal = Journal(interrupted, identity, alone=alone)
        with pytest.raises(StoreError, match=f"process {os.getpid()} on .* is converting into this folder.*--only-lay"):
            convert(checkpoint, interrupted, only_layers=layers)
        journal.close()
    convert(checkpoint, interrupted)
    assert digests(interrupted) == whole


def digests_of_tree(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"}


def kill(checkpoint: Path, folder: Path, kills: int, seed: int) -> None:
    command = [sys.executable, str(Path(__file__).parent / "killing.py"), str(checkpoint), str(folder), str(kills)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(seed)], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["kills"] >= kills


def test_killed_at_random_instants(checkpoint: Path, tmp_path: Path) -> None:
    kill(checkpoint, tmp_path, 6, seed=3)


@pytest.mark.parametrize("stride", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_steps_that_make_something_durable(checkpoint: Path, tmp_path: Path, stride: int) -> None:
    command = [sys.executable, str(Path(__file__).parent / "kill_points.py"), str(checkpoint), str(tmp_path)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(stride)], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    killed = json.loads(done.stdout)
    assert killed["pwrite"] > 100 // stride and killed["unlink"] > 5 // stride
    assert killed["replace"] == ceil_div(2 * 15, stride)  # before and after each of the 15 files that get their names


@pytest.mark.slow
def test_killed_at_200_random_instants(checkpoint: Path, tmp_path: Path) -> None:
    kill(checkpoint, tmp_path, 200, seed=4)
