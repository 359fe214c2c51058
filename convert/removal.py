"""Deleting a local source shard by shard while it is converted (`--delete-source`), and going on without it.

Owns the order that makes this safe: a shard goes only when everything made of it was read back from the store's files
and has the recorded checksums, and its header was saved before, so that an interrupted conversion can be resumed from
what is left. A shard with tensors that are not in the store (multi-token prediction) is kept. Must not convert.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from convert.checksums import RangeReader
from convert.journal import FOLDER, Records
from convert.plan import ConversionPlan
from convert.source import LocalSource
from convert.unit import experts_of, layer_file, resident_file
from offload.errors import CheckpointError, DiskError, StoreError, UsageError
from offload.store.safetensors import read_header
from offload.store.writer import PARTIAL, disk_faults, sync_directory, write_file
from offload.types import ExpertId

_STATE = "source.json"
_HEADERS = "headers"

Part = ExpertId | str  # an expert, or the name of a file of resident tensors


class DepletedSource(LocalSource):
    """A folder some of whose shards were deleted; their headers were saved in `saved`."""

    def __init__(self, folder: str | Path, saved: Path) -> None:
        super().__init__(folder)
        self.saved = saved
        state: dict[str, Any] = json.loads((saved / _STATE).read_bytes())
        self.gone = frozenset(state["sizes"]) - frozenset(self.files)
        for file, digest in state["digests"].items():
            if file in self.files and self.digest(file) != digest:
                raise StoreError(
                    f"{self.where(file)} is not the file that the conversion was begun with; its other shards are "
                    "deleted already, so only the same source can go on"
                )
        self.files = state["sizes"] | self.files
        self.__dict__["revision"] = state["revision"]  # that of the whole source

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        if file not in self.gone:
            super().read_into(file, offset, buffer)
            return
        header = (self.saved / _HEADERS / file).read_bytes()
        part = header[offset : offset + len(buffer)]
        # A reader of headers asks for a little more; the bytes behind the header are never looked at.
        if offset >= len(header):
            raise CheckpointError(
                f"{self.where(file)} was deleted with --delete-source; its data is not there any more"
            )
        buffer[:] = part.ljust(len(buffer), b"\0")


def saved_state(directory: Path) -> Path | None:
    """Where the conversion into `directory` saved what it needs to go on, if it has deleted shards."""
    folder = directory / FOLDER
    return folder if (folder / _STATE).exists() else None


class SourceRemover:
    """Deletes the shards of a local source whose content is safe in the store in `directory`.

    `found` is what earlier runs have finished.
    """

    def __init__(self, plan: ConversionPlan, directory: Path, found: Records) -> None:
        source = plan.checkpoint.source
        if not isinstance(source, LocalSource):
            raise UsageError("--delete-source is for a local folder: from the hub nothing is stored")
        self.source, self.plan, self.directory, self.records = source, plan, directory, Records()
        self.parts = self._parts_by_shard()
        for shard in self.parts:
            if (source.folder / shard).is_symlink():
                raise UsageError(f"{source.where(shard)} is a link, perhaps into a cache; --delete-source wants files")
        self.finished(found)

    @property
    def kept_line(self) -> str | None:
        """One line about the shards that stay, or None."""
        shards = {info.file for info in self.plan.checkpoint.tensors.values()}
        kept = len(shards - set(self.parts))
        return f"{kept} shards hold tensors that are not in the store; they are not deleted" if kept else None

    def saved_nbytes(self, present: Mapping[str, int]) -> int:
        """By how much less disk a run gets along because shards go meanwhile; `present` bytes of its files exist."""
        missing = {name: max(0, size - present.get(name, 0)) for name, size in self.plan.file_sizes.items()}
        waiting = dict(self.parts)
        done: set[Part] = set(self.records.experts) | set(self.records.files)
        taken = peak = 0
        freed = [0, 0]  # a unit is begun before the shards of the one before it are gone
        for unit in self.plan.units:
            layer = layer_file(self.plan, unit)
            resident = resident_file(self.plan, unit).name
            taken += missing[resident] + (missing[layer.name] if layer else 0)
            peak = max(peak, taken - freed[-2])
            done |= {resident, *experts_of(self.plan, unit)}
            gone = [shard for shard, parts in waiting.items() if parts <= done]
            freed.append(freed[-1] + sum(self.source.files[shard] for shard in gone))
            for shard in gone:
                del waiting[shard]
        return taken - peak

    def _parts_by_shard(self) -> dict[str, set[Part]]:
        """What is made of each shard that may go and is still there."""
        parts: dict[str, set[Part]] = {}
        used: set[str] = set()

        def use(part: Part, names: Iterable[str]) -> None:
            for name in names:
                used.add(name)
                parts.setdefault(self.plan.checkpoint.tensors[name].file, set()).add(part)

        for expert, linears in self.plan.mapped.experts.items():
            for linear in linears.values():
                use(expert, linear.names)
        for name, file in self.plan.residents.items():
            use(name, file.source_names)
        unused = {info.file for name, info in self.plan.checkpoint.tensors.items() if name not in used}
        return {
            shard: needed
            for shard, needed in parts.items()
            if shard not in unused and (self.source.folder / shard).exists()
        }

    def finished(self, records: Records) -> None:
        """`records` are durable: delete every shard of which everything is recorded and reads back right."""
        self.records.update(records)
        done: set[Part] = set(self.records.experts) | set(self.records.files)
        for shard in [shard for shard, parts in self.parts.items() if parts <= done]:
            with RangeReader() as reader:
                for part in sorted(self.parts[shard], key=str):
                    self._read_back(reader, part)
            self._save_state()
            with disk_faults(self.source.folder / shard, 0):
                os.unlink(self.source.folder / shard)
                sync_directory(self.source.folder)
            del self.parts[shard]

    def _read_back(self, reader: RangeReader, part: Part) -> None:
        if isinstance(part, ExpertId):
            file = self.plan.layers[part.layer]
            path = self._path(file.name)
            ok = reader.checksum(path, file.offset(part.expert), file.layout.stride) == (
                self.records.experts[part].checksum
            )
        else:
            path, sums = self._path(part), self.records.files[part]
            entries = read_header(path).tensors
            ok = all(reader.checksum(path, entry.offset, entry.nbytes) == sums[name] for name, entry in entries.items())
        if not ok:
            raise DiskError(
                f"{path} does not read back what was written; no shard was deleted for it; check the drive, "
                "then run the same command again in a new folder"
            )

    def _path(self, name: str) -> Path:
        final = self.directory / name
        return final if final.exists() else self.directory / (name + PARTIAL)

    def _save_state(self) -> None:
        """Headers and fingerprints of all shards, before the first one goes."""
        folder = self.directory / FOLDER
        if (folder / _STATE).exists():
            return
        with disk_faults(folder, 0):
            (folder / _HEADERS).mkdir(exist_ok=True)
        shards = sorted({info.file for info in self.plan.checkpoint.tensors.values()})
        for shard in shards:
            write_file(folder / _HEADERS / shard, self.plan.checkpoint.raw_header(shard))
        state = {
            "revision": self.source.revision,
            "sizes": {shard: self.source.files[shard] for shard in shards},
            "digests": {shard: self.source.digest(shard) for shard in shards},
        }
        write_file(folder / _STATE, json.dumps(state).encode())
