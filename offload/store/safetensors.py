"""Safetensors headers: strict reading and exact writing.

Owns the header's bytes: 8-byte little-endian length, JSON, data. A header is checked completely
before a byte of data is believed. Must not know what the tensors mean, nor read their data.

Why not the safetensors package: it orders the data itself, while a store needs experts back to back at
computed, page-aligned addresses, and a remote file is known by its first bytes only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from offload.errors import OffloadError, StoreError
from offload.types import PAGE, align_up

MAX_HEADER = 100_000_000
"""Largest JSON header the format allows, in bytes."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `offset` counts from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A checked header: entries in data order, first data byte, metadata."""

    tensors: Mapping[str, TensorEntry]
    data_start: int
    metadata: Mapping[str, str]


def header_length(prefix: bytes, file_size: int, what: str, error: type[OffloadError]) -> int:
    """Length of the JSON header named by the first 8 bytes of a file of `file_size` bytes."""
    if len(prefix) < 8 or file_size < 8:
        raise error(f"{what}: only {file_size} bytes; a safetensors file begins with an 8-byte header length")
    length = int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER:
        raise error(
            f"{what}: corrupt header: it claims {length} bytes, the format allows {MAX_HEADER}; "
            "fetch the file again"
        )
    if 8 + length > file_size:
        raise error(
            f"{what}: truncated: the header alone needs {8 + length} bytes, the file has {file_size}; "
            "fetch the file again"
        )
    return length


def parse_header(raw: bytes, file_size: int, what: str, error: type[OffloadError]) -> Header:
    """Check and decode the JSON header `raw` of a file of `file_size` bytes.

    `what` names the file in messages; `error` is the class raised for every fault: not JSON, unknown
    dtype, impossible shape, offsets out of range, span that disagrees with shape x itemsize, overlap,
    hole, trailing bytes.
    """
    data_start = 8 + len(raw)
    try:
        table = json.loads(raw, object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as fault:
        raise error(f"{what}: corrupt header: {fault}; fetch the file again") from None
    if not isinstance(table, dict):
        raise error(f"{what}: corrupt header: expected a JSON object, got {type(table).__name__}")
    metadata = table.pop("__metadata__", {})
    entries = [
        (name, _parse_entry(name, item, data_start, what, error)) for name, item in table.items()
    ]
    entries.sort(key=lambda pair: (pair[1].offset, pair[1].nbytes))
    position = data_start
    for name, entry in entries:
        if entry.offset != position:
            kind = "overlaps the tensor before it" if entry.offset < position else "leaves a hole before it"
            raise error(f"{what}: corrupt header: {name} {kind} (byte {entry.offset}, expected {position})")
        position += entry.nbytes
    if position != file_size:
        kind = "truncated" if position > file_size else "has trailing bytes"
        raise error(
            f"{what}: {kind}: the header describes {position} bytes, the file has {file_size}; "
            "fetch the file again"
        )
    return Header(dict(entries), data_start, metadata if isinstance(metadata, dict) else {})


def read_header(path: Path, error: type[OffloadError] = StoreError) -> Header:
    """The checked header of the file `path`."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = header_length(file.read(8), size, str(path), error)
            raw = file.read(length)
    except OSError as fault:
        raise error(f"{path}: cannot be read: {fault.strerror}") from None
    return parse_header(raw, size, str(path), error)


def build_header(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], alignment: int = PAGE
) -> bytes:
    """Length and JSON for `tensors` laid back to back in the given order.

    Padded with spaces so that data starts at a multiple of `alignment`.
    """
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(table, separators=(",", ":")).encode()
    padded = align_up(8 + len(raw), alignment) - 8
    return padded.to_bytes(8, "little") + raw.ljust(padded, b" ")


def _parse_entry(
    name: str, item: object, data_start: int, what: str, error: type[OffloadError]
) -> TensorEntry:
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        raise error(f"{what}: corrupt header: {name} must have dtype, shape and data_offsets")
    dtype = DTYPES.get(item["dtype"]) if isinstance(item["dtype"], str) else None
    if dtype is None:
        raise error(f"{what}: {name} has the unknown dtype {item['dtype']!r}; known: {', '.join(DTYPES)}")
    shape, offsets = item["shape"], item["data_offsets"]
    if not _are_sizes(shape):
        raise error(f"{what}: corrupt header: {name} has the impossible shape {shape!r}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise error(f"{what}: corrupt header: {name} has the impossible data_offsets {offsets!r}")
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise error(
            f"{what}: corrupt header: {name} spans {offsets[1] - offsets[0]} bytes, but "
            f"{item['dtype']} {shape} needs {nbytes}"
        )
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], nbytes)


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**63 for v in values
    )


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate key {next(n for n in names if names.count(n) > 1)!r}")
    return table
