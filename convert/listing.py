"""Header listings: config, and the name, dtype and shape of every tensor of a checkpoint, without any weights.

Owns the file format (JSON, compressed with xz: 43 kB for DeepSeek-V3) and a source made of it, which answers whatever
is asked of headers, so that plans need neither the weights nor a network. Listings of well-known repositories come
with the program (configs/listings).
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.source import INDEX, Checkpoint, Source
from offload.errors import CheckpointError, UsageError
from offload.store.safetensors import DTYPE_NAMES, DTYPES

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "listings"
SUFFIX = ".json.xz"
FORMAT = "expertpager-listing"

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name -> (safetensors dtype, shape)."""


class ListingSource(Source):
    """A checkpoint of which only config.json, the index and the shards' headers exist; reading data is refused."""

    def __init__(self, name: str, config: Mapping[str, Any], tensors: Tensors) -> None:
        self.name = self.short_name = name
        self.revision = "listing"
        shards: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
        for tensor, entry in tensors.items():
            shards.setdefault(_shard(tensor), {})[tensor] = entry
        self._heads: dict[str, bytes] = {}
        sizes: dict[str, int] = {}
        for shard, entries in shards.items():
            head, data = _header(entries)
            self._heads[shard] = head
            sizes[shard] = len(head) + data
        weight_map = {tensor: shard for shard, entries in shards.items() for tensor in entries}
        for file, value in (("config.json", dict(config)), (INDEX, {"weight_map": weight_map})):
            self._heads[file] = json.dumps(value).encode()
            sizes[file] = len(self._heads[file])
        self.files = sizes

    def where(self, file: str) -> str:
        return f"{self.name} (listing)/{file}"

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        head = self._heads[file]
        if offset >= len(head) or offset + len(buffer) > self.files[file]:
            raise CheckpointError(f"{self.where(file)}: a listing holds no weights")
        part = head[offset : offset + len(buffer)]
        buffer[: len(part)] = part  # a read may reach past the header; what it gets there is never looked at


def is_listing(model: str | Path) -> bool:
    """Whether `model` names a listing's file."""
    return str(model).endswith(SUFFIX) and Path(model).is_file()


def shipped_listing(repo_id: str) -> Path | None:
    """The listing of a hub repository that comes with the program. Repositories of one architecture share a file."""
    table = json.loads((FOLDER / "repositories.json").read_text(encoding="utf-8"))
    file = table.get(repo_id)
    return FOLDER / file if file else None


def load_listing(path: str | Path, name: str | None = None) -> ListingSource:
    """The listing in `path`. Raises UsageError when it is none."""
    try:
        value = json.loads(lzma.decompress(Path(path).read_bytes()))
    except OSError as fault:
        raise UsageError(f"the listing {path} cannot be read: {fault.strerror}") from None
    except (lzma.LZMAError, EOFError, ValueError) as fault:
        raise UsageError(f"{path} is no header listing: {fault}") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UsageError(f'{path} is no header listing: it lacks "format": "{FORMAT}"')
    try:
        tensors = {key: (str(dtype), tuple(map(int, shape))) for key, (dtype, *shape) in value["tensors"].items()}
        unknown = {dtype for dtype, _ in tensors.values()} - set(DTYPES)
        if unknown:
            raise ValueError(f"unknown dtype {min(unknown)}")
        return ListingSource(name or str(value["name"]), dict(value["config"]), tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as fault:
        raise UsageError(f"the listing {path} is damaged: {fault!r}") from None


def save_listing(checkpoint: Checkpoint, path: str | Path) -> Path:
    """Write the listing of `checkpoint`. Raises UsageError for another suffix or when it cannot be written."""
    target = Path(path)
    if not target.name.endswith(SUFFIX):
        raise UsageError(f"a listing is written to a file ending in {SUFFIX}, not {target.name}")
    tensors = {name: [DTYPE_NAMES[info.dtype], *info.shape] for name, info in checkpoint.tensors.items()}
    value = {
        "format": FORMAT,
        "name": checkpoint.source.short_name,
        "config": checkpoint.config,
        "tensors": tensors,
    }
    raw = lzma.compress(json.dumps(value, separators=(",", ":")).encode(), preset=9 | lzma.PRESET_EXTREME)
    try:
        target.write_bytes(raw)
    except OSError as fault:
        raise UsageError(f"the listing {target} cannot be written: {fault.strerror}") from None
    return target


def _shard(tensor: str) -> str:
    layer = tensor.split(".")[2] if tensor.startswith("model.layers.") else "none"
    return f"model-{layer}.safetensors"


def _header(entries: Tensors) -> tuple[bytes, int]:
    """The header of a shard with these tensors, and the bytes of its data."""
    table, at = {}, 0
    for name, (dtype, shape) in entries.items():
        size = DTYPES[dtype].itemsize
        for extent in shape:
            size *= extent
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text, at
