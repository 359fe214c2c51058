"""Reading a store: where each expert lies, and the resident tensors.

Owns opening and structural checks. It never searches: expert addresses are computed from the layout and
compared with the file's header once, when the store is opened. Must not cache experts nor decide
what is read when.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload.config import ModelConfig
from offload.errors import StoreError
from offload.quant import Codec, QuantizedTensor, get_codec
from offload.store.direct import HugePages
from offload.store.hf_config import scale_suffix
from offload.store.layout import ExpertLayout, LayerFile, disk_suffix, resident_file_name
from offload.store.manifest import MANIFEST_NAME, Manifest, checksum
from offload.store.safetensors import Header, TensorEntry, read_header
from offload.types import ExpertId, Extent

CONFIG_NAME = "config.json"


@dataclass(frozen=True)
class Store:
    """An opened store. Opening reads small files and headers only."""

    path: Path
    manifest: Manifest
    hf_config: dict[str, Any]
    config: ModelConfig
    layout: ExpertLayout

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open the store in the directory `path` and check its structure.

        Raises StoreError: not a store, unfinished, newer format, a file missing or of the wrong size, a
        header that is not the one the layout implies. Checksums of data are the business of `verify`.
        """
        directory = Path(path)
        manifest = Manifest.load(directory)
        hf_config = read_json(directory / CONFIG_NAME)
        config = ModelConfig.from_hf(hf_config)
        codec = get_codec(manifest.recipe["experts"])
        layout = ExpertLayout(codec, config.hidden_size, config.moe_intermediate_size)
        store = cls(directory, manifest, hf_config, config, layout)
        store._check_structure()
        return store

    def altered(self, names: Iterable[str]) -> list[str]:
        """Those of the small files `names` that are not what the manifest says: edited, damaged or missing."""
        return [name for name in names if name in self.manifest.files and not self._as_written(name)]

    def _as_written(self, name: str) -> bool:
        try:
            return checksum((self.path / name).read_bytes()) == self.manifest.files[name]
        except OSError:
            return False

    def locate(self, expert: ExpertId) -> Extent:
        """The extent of `expert`: one contiguous read."""
        path, file = self._layer_files[expert.layer]
        return Extent(path, file.offset(expert.expert), self.layout.stride)

    def layer_file(self, layer: int) -> LayerFile:
        """Layout of the file with the routed experts of `layer`."""
        return self._layer_files[layer][1]

    def resident(self, module: str) -> QuantizedTensor:
        """The weight of the resident linear `module` (HF name without `.weight`), read into memory."""
        codec = get_codec(self.codec_name(module))
        rows, cols = self._module_shape(module, codec)
        parts = {}
        for spec in codec.parts(rows, cols):
            name = f"{module}.{disk_suffix(spec.suffix, self._scale_suffix)}"
            tensor = self._read(name, self._memory.take)
            if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
                raise StoreError(
                    f"{self.path}: {name} is {tensor.dtype} {list(tensor.shape)}, "
                    f"expected {spec.dtype} {list(spec.shape)}"
                )
            parts[spec.suffix] = tensor
        return QuantizedTensor(codec, rows, cols, parts)

    def codec_name(self, module: str) -> str:
        """The codec of the resident linear `module`."""
        return self.manifest.resident_codecs.get(module, "bf16")

    def tensor(self, name: str) -> Tensor:
        """The resident tensor `name` exactly as stored, read into memory of its own."""
        return self._read(name, bytearray)

    def _read(self, name: str, allocate: Callable[[int], bytearray | memoryview]) -> Tensor:
        found = self._resident_entries.get(name)
        if found is None:
            raise StoreError(f"{self.path}: tensor {name} is missing; convert the store again")
        file, entry = found
        return read_tensor(file, entry, allocate(max(entry.nbytes, 1)))

    @cached_property
    def _memory(self) -> HugePages:
        """Where matrices lie, which every token streams."""
        return HugePages()

    @cached_property
    def resident_nbytes(self) -> int:
        """Bytes of the tensors that stay in memory, as stored: all but experts and multi-token prediction."""
        return sum(self.resident_sizes.values())

    @cached_property
    def resident_sizes(self) -> dict[str, int]:
        """Bytes of each of these tensors by name."""
        unused = {self.path / resident_file_name(layer) for layer in self.config.mtp_layers}
        return {name: entry.nbytes for name, (path, entry) in self._resident_entries.items() if path not in unused}

    @cached_property
    def resident_headers(self) -> dict[Path, Header]:
        """Checked headers of all files with resident tensors."""
        return {self.path / name: read_header(self.path / name) for name in sorted(self.manifest.tensors)}

    def _check_structure(self) -> None:
        missing = set(self._expert_layers) ^ set(self.manifest.layers)
        if missing:
            raise StoreError(
                f"{self.path / MANIFEST_NAME}: MoE layers {sorted(missing)} differ between config.json and the manifest"
            )
        expected = {resident_file_name(None)} | {
            resident_file_name(layer) for layer in (*range(self.config.num_hidden_layers), *self.config.mtp_layers)
        }
        if set(self.manifest.tensors) != expected:
            names = sorted(set(self.manifest.tensors) ^ expected)
            raise StoreError(f"{self.path / MANIFEST_NAME}: unexpected or missing resident files: {', '.join(names)}")
        for path, file in self._layer_files.values():
            _check_layer_file(path, file)

    def _module_shape(self, module: str, codec: Codec) -> tuple[int, int]:
        payload = codec.parts(1, 1)[0].suffix
        found = self._resident_entries.get(f"{module}.{payload}")
        if found is None or len(found[1].shape) != 2:
            raise StoreError(f"{self.path}: {payload} of {module} is missing; convert the store again")
        try:
            return codec.shape_of(found[1].shape, lambda suffix: self.tensor(f"{module}.{suffix}"))
        except (ValueError, KeyError, TypeError) as fault:
            what = f"{self.path}: the shape of {module} is damaged ({fault})"
            raise StoreError(f"{what}; run `expertpager verify --repair` on the store") from None

    @cached_property
    def _scale_suffix(self) -> str:
        return scale_suffix(self.hf_config)

    @cached_property
    def _layer_files(self) -> dict[int, tuple[Path, LayerFile]]:
        """Path and layout by layer. One path for all experts of a file: making and comparing paths takes longer than
        the rest of a read's preparation."""
        count = self.config.n_routed_experts
        files = [LayerFile(layer, count, self.layout, self._scale_suffix) for layer in self._expert_layers]
        return {file.layer: (self.path / file.name, file) for file in files}

    @property
    def _expert_layers(self) -> list[int]:
        config = self.config
        return [*config.moe_layers, *(layer for layer in config.mtp_layers if config.has_experts(layer))]

    @cached_property
    def _resident_entries(self) -> dict[str, tuple[Path, TensorEntry]]:
        return {
            name: (path, entry)
            for path, header in self.resident_headers.items()
            for name, entry in header.tensors.items()
        }


def read_tensor(path: Path, entry: TensorEntry, buffer: bytearray | memoryview) -> Tensor:
    """The tensor at `entry` of the file `path`, read into `buffer`. A short read is an error."""
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(entry.offset)
            view, done = memoryview(buffer)[: entry.nbytes], 0
            while done < entry.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise StoreError(
                        f"{path}: truncated: {done} of {entry.nbytes} bytes at offset {entry.offset}; "
                        "run `expertpager verify` on the store"
                    )
                done += count
    except OSError as fault:
        raise StoreError(f"{path}: cannot be read: {fault.strerror}") from None
    raw = torch.frombuffer(buffer, dtype=torch.uint8)[: entry.nbytes]
    return (
        raw.view(entry.dtype).view(entry.shape)
        if math.prod(entry.shape)
        else torch.empty(entry.shape, dtype=entry.dtype)
    )


def _check_layer_file(path: Path, file: LayerFile) -> None:
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            header = handle.read(file.data_start)
    except FileNotFoundError:
        raise StoreError(f"{path}: missing; convert the store again") from None
    except OSError as fault:
        raise StoreError(f"{path}: cannot be read: {fault.strerror}") from None
    if size != file.nbytes:
        raise StoreError(
            f"{path}: {size} bytes, expected {file.nbytes}; run `expertpager verify --repair` on the store"
        )
    if header != file.header:
        raise StoreError(f"{path}: damaged header; run `expertpager verify --repair` on the store")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a store."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise StoreError(f"{path}: missing; convert the store again") from None
    except (OSError, ValueError, RecursionError) as fault:
        raise StoreError(f"{path}: cannot be read: {fault}") from None
    if not isinstance(value, dict):
        raise StoreError(f"{path}: expected a JSON object")
    return value
