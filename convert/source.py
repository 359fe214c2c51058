"""Where a checkpoint comes from, behind one interface, and its tensors by name.

Owns the `Source` contract (files and byte ranges), the local folder, and `Checkpoint`: config, index,
validated headers, tensors read by name. Must not know what the tensors are for. The Hugging Face hub is
in `convert.hub`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offload.errors import CheckpointError
from offload.store.direct import PageArrays, open_direct
from offload.store.safetensors import Header, header_length, parse_header
from offload.types import PAGE

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tiktoken.model",
)
"""Files copied verbatim into a store when the source has them."""

_LARGEST_TEXT = 256 << 20
_DIRECT = 1 << 20  # reads of so many bytes go past the page cache: nobody reads them again
_MERGE_GAP = 64 << 10  # ranges closer than this are fetched as one
_HEADER_THREADS = 16
_FIRST_READ = 128 << 10  # most headers fit, so that one request per shard is enough


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `nbytes` bytes from `offset` of the source's file `file`."""

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Source(ABC):
    """Named files that can be read by byte range. Safe to use from several threads."""

    name: str
    """What the user typed."""
    short_name: str
    """What a store records: the repository, or the folder's own name without the path to it."""
    revision: str
    """Identifies the exact content: a commit of the hub, or a fingerprint of a folder."""
    files: Mapping[str, int]
    """Sizes in bytes by file name."""
    parallel_reads: int = 2
    """How many reads at the same time make it fastest."""

    @abstractmethod
    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `file` from `offset`. Raises CheckpointError."""

    @abstractmethod
    def where(self, file: str) -> str:
        """`file` as shown in messages."""

    def cancel(self) -> None:
        """Give up what is being read: waiting reads fail soon. Nothing can be read afterwards."""
        return

    def close(self) -> None:
        """Give back files and connections."""
        return

    def read(self, file: str, offset: int, nbytes: int) -> bytes:
        """`nbytes` bytes of `file` from `offset`."""
        buffer = bytearray(nbytes)
        self.read_into(file, offset, memoryview(buffer))
        return bytes(buffer)

    def read_array(self, file: str, offset: int, nbytes: int) -> np.ndarray:
        """`nbytes` bytes of `file` from `offset`, as uint8 [nbytes]."""
        buffer = np.empty(nbytes, dtype=np.uint8)
        if nbytes:
            self.read_into(file, offset, memoryview(buffer.data))
        return buffer

    def read_small(self, file: str) -> bytes:
        """The whole of a text file such as config.json."""
        size = self.files.get(file)
        if size is None:
            raise CheckpointError(f"{self.name} has no {file}: it is not a Hugging Face checkpoint")
        if size > _LARGEST_TEXT:
            raise CheckpointError(f"{self.where(file)} has {size} bytes; that is no {file}")
        return self.read(file, 0, size)


class LocalSource(Source):
    """A folder on disk. Its revision is a hash of every header and of samples of the data."""

    def __init__(self, folder: str | Path) -> None:
        self.name = str(folder)
        self.folder = Path(folder)
        self.short_name = self.folder.resolve().name
        try:
            self.files = {entry.name: entry.stat().st_size for entry in os.scandir(self.folder) if entry.is_file()}
        except OSError as error:
            raise CheckpointError(f"cannot read the folder {folder}: {error.strerror}") from None
        self._arrays = PageArrays()
        self._open: dict[str, int] = {}
        self._direct: dict[str, int | None] = {}
        self._lock = threading.Lock()

    @cached_property
    def revision(self) -> str:  # type: ignore[override]
        """Content, not dates or paths: a copy of the folder is the same source."""
        digest = hashlib.sha256()
        for file in sorted(self.files):
            if file.endswith(".safetensors") or file in ("config.json", INDEX):
                digest.update(f"{file}\0{self.files[file]}\0{self.digest(file)}\0".encode())
        return "sha256:" + digest.hexdigest()[:40]

    def digest(self, file: str) -> str:
        """Fingerprint of a file: of a shard its header and samples of its data, of others everything."""
        size = self.files[file]
        if not file.endswith(".safetensors"):
            return hashlib.sha256(self.read_small(file)).hexdigest()
        # Different training runs of one model share headers; the samples tell them apart.
        spots = sorted({0, 1 << 20, size // 3, size // 2, max(0, size - 4096)})
        parts = [self.read(file, at, min(4096, size - at)) for at in spots if at < size]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def where(self, file: str) -> str:
        return str(self.folder / file)

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        done = 0
        try:
            fd = self._descriptor(file)
            while done < len(buffer):
                count = os.preadv(fd, [buffer[done:]], offset + done)
                if count == 0:
                    raise self._truncated(file, offset + done, offset + len(buffer))
                done += count
        except OSError as error:
            raise CheckpointError(f"cannot read {self.where(file)} at byte {offset + done}: {error.strerror}") from None

    def read_array(self, file: str, offset: int, nbytes: int) -> np.ndarray:
        fd = self._direct_descriptor(file) if nbytes >= _DIRECT else None
        if fd is None:
            return super().read_array(file, offset, nbytes)
        begin, end = offset // PAGE * PAGE, offset + nbytes
        array, done = self._arrays.take(end - begin), 0
        pages = memoryview(array.data)
        while begin + done < end:
            try:
                count = os.preadv(fd, [pages[done:]], begin + done)
            except OSError:
                # Some file systems refuse only now; and the ordinary read says what is wrong.
                return super().read_array(file, offset, nbytes)
            done += count
            if count % PAGE or not count:
                break  # the end of the file
        if begin + done < end:
            raise self._truncated(file, begin + done, end)
        return array[offset - begin : end - begin]

    def _truncated(self, file: str, size: int, end: int) -> CheckpointError:
        return CheckpointError(
            f"{self.where(file)} ends at byte {size}, but bytes up to {end} are needed: it is truncated"
        )

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._open:
                self._open[file] = os.open(self.folder / file, os.O_RDONLY | os.O_CLOEXEC)
            return self._open[file]

    def _direct_descriptor(self, file: str) -> int | None:
        with self._lock:
            if file not in self._direct:
                try:
                    self._direct[file] = open_direct(self.folder / file, os.O_RDONLY)
                except OSError:
                    self._direct[file] = None  # the ordinary read says what is wrong
            return self._direct[file]

    def close(self) -> None:
        with self._lock:
            for fd in (*self._open.values(), *self._direct.values()):
                if fd is not None:
                    os.close(fd)
            self._open.clear()
            self._direct.clear()


class Checkpoint:
    """The tensors and files of a source, checked: every shard there, every header sound."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.header_speed: float | None = None  # bytes per second, seen while headers were read
        self.config = _json_object(source, "config.json")
        weight_map = self._weight_map()
        self.tensors: dict[str, TensorInfo] = self._resolve(weight_map)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def side_files(self) -> dict[str, bytes]:
        """Tokenizer and generation files, verbatim."""
        present = (file for file in SIDE_FILES if file in self.source.files)
        return {file: self.source.read_small(file) for file in present}

    def info(self, name: str) -> TensorInfo:
        """Where the tensor `name` lies. Raises CheckpointError when the checkpoint lacks it."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.source.name} has no tensor {name}") from None

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors called `names`, in their own dtypes.

        Neighbours in a file are fetched with one read; the tensors are views into its buffer.
        """
        wanted = sorted((self.info(name) for name in names), key=lambda t: (t.file, t.offset))
        tensors: dict[str, Tensor] = {}
        for run in _runs(wanted):
            begin, end = run[0].offset, max(t.offset + t.nbytes for t in run)
            buffer = self.source.read_array(run[0].file, begin, end - begin)
            for info in run:
                at = info.offset - begin
                tensors[info.name] = as_tensor(buffer[at : at + info.nbytes], info)
        return tensors

    def _weight_map(self) -> dict[str, str] | None:
        """The index, or None when one file holds everything."""
        if INDEX not in self.source.files:
            if SINGLE in self.source.files:
                return None
            raise CheckpointError(
                f"{self.source.name} has neither {INDEX} nor {SINGLE}: it is not a safetensors checkpoint"
            )
        weight_map = _json_object(self.source, INDEX).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(file, str) for file in weight_map.values())
        ):
            raise CheckpointError(f"{self.source.where(INDEX)} has no weight_map of file names")
        return weight_map

    def _resolve(self, weight_map: dict[str, str] | None) -> dict[str, TensorInfo]:
        shards = sorted(set(weight_map.values())) if weight_map else [SINGLE]
        missing = [file for file in shards if file not in self.source.files]
        if missing:
            raise CheckpointError(
                f"{self.source.name} lacks {len(missing)} of {len(shards)} shards listed in "
                f"{INDEX}, the first is {missing[0]}; download them again"
            )
        begun = time.perf_counter()
        with ThreadPoolExecutor(min(_HEADER_THREADS, len(shards))) as pool:
            headers = dict(zip(shards, pool.map(self._header, shards), strict=True))
        read = sum(min(self.source.files[file], max(_FIRST_READ, h.data_start)) for file, h in headers.items())
        self.header_speed = read / (time.perf_counter() - begun)
        if weight_map is None:
            weight_map = dict.fromkeys(headers[SINGLE].tensors, SINGLE)
        tensors: dict[str, TensorInfo] = {}
        for name, file in weight_map.items():
            entry = headers[file].tensors.get(name)
            if entry is None:
                raise CheckpointError(
                    f"{INDEX} says that {name} is in {file}, but that shard does not hold it; "
                    "index and shards belong to different checkpoints"
                )
            tensors[name] = TensorInfo(name, file, entry.dtype, entry.shape, entry.offset, entry.nbytes)
        for file, header in headers.items():
            for name in header.tensors:
                if name in tensors and tensors[name].file != file:
                    raise CheckpointError(
                        f"{name} is both in {tensors[name].file} and in {file}; {self.source.name} is a mixture of "
                        "checkpoints, download it again"
                    )
        return tensors

    def raw_header(self, file: str) -> bytes:
        """The first bytes of a shard, up to its data."""
        size = self.source.files[file]
        head = self.source.read(file, 0, min(size, _FIRST_READ))
        end = 8 + header_length(head[:8], size, self.source.where(file), CheckpointError)
        if end > len(head):
            head += self.source.read(file, len(head), end - len(head))
        return head[:end]

    def _header(self, file: str) -> Header:
        raw = self.raw_header(file)
        return parse_header(raw[8:], self.source.files[file], self.source.where(file), CheckpointError)


def as_tensor(raw: np.ndarray, info: TensorInfo) -> Tensor:
    """`raw` bytes as the tensor that `info` describes, without a copy where alignment allows it."""
    if math.prod(info.shape) == 0:
        return torch.empty(info.shape, dtype=info.dtype)
    if raw.ctypes.data % info.dtype.itemsize:
        raw = raw.copy()
    return torch.from_numpy(raw).view(info.dtype).view(info.shape)


def _runs(infos: list[TensorInfo]) -> list[list[TensorInfo]]:
    """`infos`, sorted by place, grouped so that each group is worth one read."""
    runs: list[list[TensorInfo]] = []
    for info in infos:
        if runs:
            last = runs[-1][-1]
            gap = info.offset - (last.offset + last.nbytes)
            if last.file == info.file and gap <= _MERGE_GAP:
                runs[-1].append(info)
                continue
        runs.append([info])
    return runs


def _json_object(source: Source, file: str) -> dict[str, Any]:
    try:
        value = json.loads(source.read_small(file))
    except ValueError as error:
        raise CheckpointError(f"{source.where(file)} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{source.where(file)} is not a JSON object")
    return value


def open_source(source: str | Path, revision: str | None = None) -> Source:
    """The local folder, the header listing or the hub repository that `source` names."""
    from convert.listing import is_listing, load_listing

    if is_listing(source):
        return load_listing(source)
    if Path(source).is_dir():
        if revision is not None:
            raise CheckpointError(f"{source} is a folder: it has no revision {revision!r} to choose")
        return LocalSource(source)
    from convert.hub import HubSource, is_repo_id

    if not is_repo_id(str(source)):
        raise CheckpointError(f"{source} is neither a folder nor a Hugging Face repository (owner/name)")
    return HubSource(str(source), revision)
