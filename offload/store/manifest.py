"""`expertpager.json`: what a store is made of, with a checksum for every byte.

Owns the manifest's schema, strict parsing and exact text: a manifest that was changed by one bit does
not parse. Must not read tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

import xxhash

from offload.errors import StoreError

MANIFEST_NAME = "expertpager.json"
FORMAT = "expertpager-store"
FORMAT_VERSION = 1

_REPAIR = "run `expertpager verify --repair` on the store"

_KEYS = {
    "format", "format_version", "checksum", "source", "recipe", "resident_codecs", "layers", "tensors", "files",
}  # fmt: skip


def checksum(data: bytes | memoryview) -> str:
    """Hex digest of `data` (XXH3, 128 bits: finds damage at memory speed; not a defence against malice)."""
    return xxhash.xxh3_128_hexdigest(data)


@dataclass(frozen=True)
class LayerRecord:
    """Checksums and errors of one MoE layer's file.

    `experts[e]` is the checksum of expert e's extent, `errors[e]` its relative RMSE against the source
    for gate, up and down projection.
    """

    header: str
    tail: str
    experts: tuple[str, ...]
    errors: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Manifest:
    """A finished store. Layers are keyed by decoder layer index, tensors by file name and tensor name.

    In `tensors[file]` the key "" holds the checksum of the file's header.
    """

    source: Mapping[str, Any]
    recipe: Mapping[str, Any]
    resident_codecs: Mapping[str, str] = field(default_factory=dict)
    layers: Mapping[int, LayerRecord] = field(default_factory=dict)
    tensors: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    def dump(self) -> str:
        """The manifest's text. Equal manifests have equal text."""
        body = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "checksum": "",
            "source": dict(self.source),
            "recipe": dict(self.recipe),
            "resident_codecs": dict(self.resident_codecs),
            "layers": {
                str(layer): {
                    "header": record.header,
                    "tail": record.tail,
                    "experts": list(record.experts),
                    "errors": [list(error) for error in record.errors],
                }
                for layer, record in self.layers.items()
            },
            "tensors": {file: dict(names) for file, names in self.tensors.items()},
            "files": dict(self.files),
        }
        body["checksum"] = checksum(_text(body).encode())
        return _text(body)

    @classmethod
    def load(cls, directory: Path, name: str = MANIFEST_NAME) -> Manifest:
        """The manifest in the file `name` of a store. Raises StoreError when it is absent, newer or damaged."""
        path = directory / name
        convert = f"`expertpager convert SOURCE -o {quote(str(directory))}`"
        if not directory.is_dir():
            raise StoreError(f"{directory}: no such directory; create a store with {convert}")
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            raise StoreError(
                f"{directory}: not a finished store (no {MANIFEST_NAME}); create or finish it with {convert}"
            ) from None
        except OSError as fault:
            raise StoreError(f"{path}: cannot be read: {fault.strerror}") from None
        return cls.parse(raw, path)

    @classmethod
    def parse(cls, raw: bytes, path: Path) -> Manifest:
        """The manifest in `raw`; `path` names it in messages."""
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError) as fault:
            raise StoreError(f"{path}: damaged: {fault}; {_REPAIR}") from None
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise StoreError(f"{path}: not the manifest of an expertpager store")
        version = body.get("format_version")
        if version != FORMAT_VERSION:
            relation = "newer" if isinstance(version, int) and version > FORMAT_VERSION else "other"
            raise StoreError(
                f"{path}: store format version {version!r} was written by a {relation} version; this one "
                f"reads version {FORMAT_VERSION}; upgrade expertpager or convert again"
            )
        if set(body) != _KEYS:
            raise StoreError(f"{path}: unexpected or missing keys: {', '.join(sorted(set(body) ^ _KEYS))}")
        try:
            manifest = cls(
                source=dict(body["source"]),
                recipe=dict(body["recipe"]),
                resident_codecs=dict(body["resident_codecs"]),
                layers={int(layer): _record(item) for layer, item in body["layers"].items()},
                tensors={file: dict(names) for file, names in body["tensors"].items()},
                files=dict(body["files"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as fault:
            raise StoreError(f"{path}: damaged: {type(fault).__name__}: {fault}; {_REPAIR}") from None
        if manifest.dump().encode() != raw:
            raise StoreError(f"{path}: damaged: its checksum does not match its content; {_REPAIR}")
        return manifest


def _record(item: Mapping[str, Any]) -> LayerRecord:
    if set(item) != {"header", "tail", "experts", "errors"}:
        raise ValueError(f"a layer has the keys {sorted(item)}")
    return LayerRecord(
        header=item["header"],
        tail=item["tail"],
        experts=tuple(item["experts"]),
        errors=tuple((float(g), float(u), float(d)) for g, u, d in item["errors"]),
    )


def _text(body: Mapping[str, Any]) -> str:
    return json.dumps(body, indent=1, sort_keys=True, allow_nan=False) + "\n"
