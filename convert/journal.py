"""What a conversion has finished and who works on what, so that a crash at any instant loses only unfinished work.

Owns the folder `.convert` inside an unfinished store:

    lock               held by every run: by a run for the whole store alone, by runs for some layers together
    conversion.json    what is converted into what; written once, before any work
    layer-00005.jsonl  one append-only journal per unit; whoever works on the unit holds a lock on it

Locks are flock: the kernel, or the server of a network file system, drops them when their owner dies, so that nothing
depends on clocks or on a process that still answers. The journal of a unit is itself what is locked, because a network
file system shows the newest bytes of a file to whoever has just locked it. Records are appended only after the bytes
they speak of are durable; each line carries its own checksum, so the torn line of a crash is recognised and dropped.
Must not write the store's files.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from offload.errors import StoreError
from offload.store.manifest import MANIFEST_NAME, checksum
from offload.store.writer import disk_faults, pwrite_all, sync_directory, write_file
from offload.types import ExpertId

Unit = int | None
"""What is claimed as a whole: a decoder layer, or (None) what belongs to no layer: embedding, final norm, head."""

FOLDER = ".convert"
RECORD_NBYTES = 160
"""About the size of one record, for the estimate of disk space."""

_LOCK = "lock"
_TURN = "turn"  # locked for the short steps that one process takes at a time: to begin, and to end
_IDENTITY = "conversion.json"
_REMOVED = FOLDER + ".removed"
_ASIDE = "source"  # a name for people; the revision identifies the content


@dataclass(frozen=True)
class ExpertRecord:
    """A finished expert: checksum of its extent and relative RMSE of gate, up and down projection."""

    checksum: str
    errors: tuple[float, float, float]


@dataclass
class Records:
    """Finished work: experts by id, resident files by name with the checksums of their tensors."""

    experts: dict[ExpertId, ExpertRecord] = field(default_factory=dict)
    files: dict[str, dict[str, str]] = field(default_factory=dict)

    def update(self, other: Records) -> None:
        """Add what `other` holds."""
        self.experts |= other.experts
        self.files |= other.files


class Journal:
    """The journals of one conversion into `directory`; holds the run's lock until closed.

    `identity` says what is converted into what. A run that is `alone` refuses to begin while another one is under way;
    the others share the conversion unit by unit.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any], *, alone: bool = True) -> None:
        self.directory, self.folder = directory, directory / FOLDER
        self._lock = _take_lock(directory, self.folder, alone)
        try:
            with self.turn():
                self.identity = self._agree(dict(identity))
        except BaseException:
            self.close()
            raise

    def claim(self, unit: Unit) -> Claim | None:
        """The right to work on `unit`; None while another process has it, and when another one ended the conversion."""
        path = _path(self.folder, unit)
        if self.ended:
            return None
        with disk_faults(path, 0):
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                if self.ended:
                    return None
                raise
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _same_file(path, fd):
                    return Claim(path, fd)
            except BlockingIOError:
                pass
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
            return None

    @property
    def ended(self) -> bool:
        """Whether the store is finished."""
        return (self.directory / MANIFEST_NAME).exists()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A block that one process at a time is in; others wait. Inside it, the store may have been finished."""
        path, fd = self.folder / _TURN, -1
        with disk_faults(path, 0):
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                fcntl.flock(fd, fcntl.LOCK_EX)
            except FileNotFoundError:
                if not self.ended:  # else the journal was removed, and there is nothing to take turns for
                    raise
        try:
            yield
        finally:
            if fd >= 0:
                os.close(fd)

    def remove(self) -> None:
        """The store is finished: delete the journal."""
        remove_journal(self.directory)
        self.close()

    def close(self) -> None:
        """Release the lock; the records stay for the next run."""
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1

    def _agree(self, identity: dict[str, Any]) -> dict[str, Any]:
        """The identity the conversion was begun with, which must be this one."""
        path = self.folder / _IDENTITY
        if self.ended:  # while this run waited for its turn: the journal is gone, or about to go
            return identity
        if not path.exists():
            _require_empty(self.directory)
            write_file(path, _line(identity))
            return identity
        items, _ = _sound(path.read_bytes())
        if not items:
            raise StoreError(f"{path}: damaged; delete the folder {self.directory} and convert again")
        begun = items[0]
        for key in sorted((set(begun) | set(identity)) - {_ASIDE}):
            if begun.get(key) != identity.get(key):
                commit = key == "source revision" and ":" not in str(begun.get(key))
                remedy = f"go on with --revision {begun.get(key)}" if commit else "use the same source and options"
                raise StoreError(
                    f"{self.directory}: this conversion was begun with {key} {begun.get(key)}, now it is "
                    f"{identity.get(key)}; {remedy}, or another folder"
                )
        return begun


class Claim:
    """A unit that this process works on, and what is recorded of it. Closing it lets others have the unit."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self._fd = path, fd
        data = os.pread(fd, os.fstat(fd).st_size, 0)
        self.records, self._end = _parse(data)

    def add(self, records: Records) -> None:
        """Append `records` durably. Their bytes in the store must be durable already."""
        self.records.update(records)
        self._append(records)

    def keep(self, records: Records) -> None:
        """Forget everything but `records`: the bytes of the rest are gone."""
        self.records, self._end = records, 0
        with disk_faults(self.path, 0):
            os.ftruncate(self._fd, 0)
        self._append(records)

    def close(self) -> None:
        """Give the unit back."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _append(self, records: Records) -> None:
        data = b"".join(_line(item) for item in _items(records))
        with disk_faults(self.path, len(data)):
            # At the end of the sound lines, not of the file: what a crash left behind them is overwritten.
            pwrite_all(self._fd, data, self._end)
            os.fdatasync(self._fd)
        self._end += len(data)


def recorded(directory: Path, unit: Unit) -> Records:
    """What is recorded of `unit` in the conversion into `directory`, also while another process works on it."""
    try:
        return _parse(_path(directory / FOLDER, unit).read_bytes())[0]
    except FileNotFoundError:
        return Records()


def remove_journal(directory: Path) -> None:
    """Delete the journal of a finished store, or what a killed process left of it."""
    shutil.rmtree(directory / _REMOVED, ignore_errors=True)
    # Renamed first: a process that still looks for work cannot create a file in a folder that is being deleted.
    with suppress(OSError):
        os.replace(directory / FOLDER, directory / _REMOVED)
    shutil.rmtree(directory / _REMOVED, ignore_errors=True)


def _path(folder: Path, unit: Unit) -> Path:
    return folder / ("resident.jsonl" if unit is None else f"layer-{unit:05d}.jsonl")


def _items(records: Records) -> Iterable[dict[str, Any]]:
    for expert, item in records.experts.items():
        yield {"expert": list(expert), "checksum": item.checksum, "errors": list(item.errors)}
    for name, sums in records.files.items():
        yield {"file": name, "tensors": dict(sums)}


def _parse(data: bytes) -> tuple[Records, int]:
    """The records in `data`, and where its sound lines end."""
    records = Records()
    items, end = _sound(data)
    for item in items:
        if "expert" in item:
            records.experts[ExpertId(*item["expert"])] = ExpertRecord(item["checksum"], tuple(item["errors"]))
        else:
            records.files[item["file"]] = item["tensors"]
    return records, end


def _line(item: Mapping[str, Any]) -> bytes:
    text = json.dumps(item, separators=(",", ":")).encode()
    return checksum(text).encode() + b" " + text + b"\n"


def _sound(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The items of all lines before the first damaged one, and the number of bytes of these lines."""
    items, end = [], 0
    for line in data.split(b"\n")[:-1]:  # what follows the last newline was never finished
        digest, _, text = line.partition(b" ")
        if checksum(text).encode() != digest:
            break
        items.append(json.loads(text))
        end += len(line) + 1
    return items, end


def _take_lock(directory: Path, folder: Path, alone: bool) -> int:
    """Lock `directory` for this run. Raises StoreError when a run that does not share is under way."""
    foreign = _foreign(directory)
    # In this order: other runs make the folder before any file, and remove it after the manifest.
    if foreign and not folder.exists() and not (directory / MANIFEST_NAME).exists():
        _refuse(directory, foreign)  # before anything is left among somebody's files
    kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    with disk_faults(folder, 0):
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            sync_directory(directory)
            path = folder / _LOCK
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                continue  # another process ended the conversion and removed the folder right now
            try:
                fcntl.flock(fd, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(fd, 200).decode(errors="replace").strip() or "another process"
                os.close(fd)
                raise StoreError(
                    f"{directory}: {owner} is converting into this folder; wait for it to end, or run every process "
                    "with --only-layers to share the work"
                ) from None
            # The former owner may have deleted the file between open and flock: then this is a lock on nothing.
            if _same_file(path, fd):
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                return fd
            os.close(fd)


def _same_file(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _require_empty(directory: Path) -> None:
    """A folder that no conversion has begun must be empty: nobody's files get mixed up or overwritten."""
    if foreign := _foreign(directory):
        _refuse(directory, foreign)


def _foreign(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name not in (FOLDER, _REMOVED))


def _refuse(directory: Path, foreign: list[str]) -> NoReturn:
    raise StoreError(
        f"{directory}: holds {len(foreign)} files that no conversion has begun (the first is {foreign[0]}); "
        "choose an empty or new folder"
    )
