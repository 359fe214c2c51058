"""What a conversion will read and write, known from headers alone.

Owns the plan: the files of the store with their exact sizes, what is fetched, whether it fits the disk. Pure apart
from reading the source's headers; must not read weights nor write.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from convert.encoder import Encoder, select_encoder
from convert.journal import RECORD_NBYTES, Unit
from convert.mapping import CheckpointMap, Linear, map_checkpoint
from convert.packed import packed_codec
from convert.recipe import Recipe, make_recipe, notes
from convert.source import INDEX, Checkpoint
from offload.config import ModelConfig
from offload.quant import Codec, get_codec
from offload.store.hf_config import scale_suffix, store_config
from offload.store.layout import ExpertLayout, LayerFile, TensorSlot, disk_suffix, resident_file_name
from offload.store.manifest import MANIFEST_NAME
from offload.store.safetensors import build_header
from offload.store.writer import PARTIAL
from offload.types import ExpertId

INDEX_NAME = INDEX
CONFIG_NAME = "config.json"
MANIFEST_COPY = MANIFEST_NAME + ".bak"
"""A second copy of the manifest: the checksums that find damage must survive it."""

_TEXT_NBYTES = 100  # index and manifests: about so many bytes per tensor name
_HEADROOM = 16 << 20  # the file system's own bookkeeping


@dataclass(frozen=True)
class ResidentFile:
    """One file of resident tensors: linears with their codecs, and tensors kept as they are."""

    name: str
    layer: int | None
    linears: tuple[tuple[Linear, Codec], ...]
    kept: tuple[str, ...]
    slots: tuple[TensorSlot, ...]

    @cached_property
    def nbytes(self) -> int:
        return len(build_header(self.slots)) + sum(math.prod(shape) * d.itemsize for _, d, shape in self.slots)

    @property
    def source_names(self) -> tuple[str, ...]:
        """The source's tensors this file is made of."""
        return (*(name for linear, _ in self.linears for name in linear.names), *self.kept)


@dataclass(frozen=True)
class ConversionPlan:
    """Everything a conversion decides before it reads a weight."""

    checkpoint: Checkpoint
    mapped: CheckpointMap
    recipe: Recipe
    store_config: dict[str, Any]
    layout: ExpertLayout
    layers: dict[int, LayerFile]
    residents: dict[str, ResidentFile]
    encoder: Encoder
    encoder_note: str | None

    @property
    def config(self) -> ModelConfig:
        return self.mapped.config

    @property
    def experts(self) -> Iterator[ExpertId]:
        """All routed experts in the order of the store."""
        return iter(self.mapped.experts)

    @property
    def units(self) -> list[Unit]:
        """What a conversion is divided into: what belongs to no layer (None), and every decoder layer."""
        return [file.layer for file in self.residents.values()]

    @cached_property
    def resident_codecs(self) -> dict[str, str]:
        """Codec by resident linear module."""
        return {linear.module: codec.name for file in self.residents.values() for linear, codec in file.linears}

    @cached_property
    def fetch_nbytes(self) -> int:
        """Bytes to read from the source."""
        experts = sum(linear.nbytes for item in self.mapped.experts.values() for linear in item.values())
        tensors = self.checkpoint.tensors
        return experts + sum(tensors[name].nbytes for file in self.residents.values() for name in file.source_names)

    @cached_property
    def file_sizes(self) -> dict[str, int]:
        """Exact size of every safetensors file of the store."""
        # Headers of layers whose numbers have as many digits are equally long: one of each is built.
        alike = {len(str(file.layer)): file for file in self.layers.values()}
        nbytes = {digits: file.nbytes for digits, file in alike.items()}
        sizes = {file.name: nbytes[len(str(file.layer))] for file in self.layers.values()}
        return sizes | {name: file.nbytes for name, file in self.residents.items()}

    @cached_property
    def store_nbytes(self) -> int:
        """Bytes of the finished store; its small text files are estimated."""
        names = sum(1 for _ in self.tensor_names())
        return sum(self.file_sizes.values()) + names * _TEXT_NBYTES

    def disk_nbytes(self, present: dict[str, int]) -> int:
        """Bytes of free disk needed when the files in `present` already take so many bytes."""
        missing = sum(max(0, size - present.get(name, 0)) for name, size in self.file_sizes.items())
        text = sum(1 for _ in self.tensor_names()) * _TEXT_NBYTES
        return missing + text + len(self.mapped.experts) * RECORD_NBYTES + _HEADROOM

    def tensor_names(self) -> Iterator[tuple[str, str]]:
        """(tensor, file) for every tensor of the store."""
        for layer_file in self.layers.values():
            for name, _, _ in layer_file.tensors():
                yield name, layer_file.name
        for resident in self.residents.values():
            for name, _, _ in resident.slots:
                yield name, resident.name

    @cached_property
    def notes(self) -> list[str]:
        """Lines the user should read."""
        lines = notes(self.recipe, self.mapped)
        return [line for line in (self.mapped.left_out_line, self.mapped.mtp_line, self.encoder_note) if line] + lines


def plan_conversion(
    checkpoint: Checkpoint,
    *,
    experts: str | None = None,
    resident: str | None = None,
    head: str = Recipe.head,
    embedding: str = Recipe.embedding,
    scales: str = Recipe.scales,
    mtp: bool = Recipe.mtp,
    kernels: str = "auto",
) -> ConversionPlan:
    """Plan the conversion of `checkpoint`. Reads no weights.

    `experts` defaults to int4-g32, or to the source's own codec where its experts are quantized already; those pass
    through unchanged. `kernels` chooses the encoder: native, reference (torch), or auto. All give the same bytes.

    Raises ConfigError, CheckpointError, CodecError and UsageError for anything that cannot be converted.
    """
    config = ModelConfig.from_hf(checkpoint.config)
    packed = packed_codec(checkpoint.config, checkpoint.source.name)
    if experts is None:
        experts = Recipe.experts if packed is None else packed.name
    recipe = make_recipe(experts, resident, scales, head, embedding, mtp, config.weight_block_size or (128, 128))
    mapped = map_checkpoint(checkpoint, config, mtp, packed)
    codecs = {
        linear.module: recipe.codec_name(linear.module, linear.rows, linear.cols)
        for linears in mapped.linears.values()
        for linear in linears
    }
    hf_config = store_config(checkpoint.config, recipe.experts, codecs, len(config.mtp_layers) if mtp else 0)
    suffix = scale_suffix(hf_config)
    layout = ExpertLayout(get_codec(recipe.experts), config.hidden_size, config.moe_intermediate_size)
    layers = {
        layer: LayerFile(layer, config.n_routed_experts, layout, suffix)
        for layer in mapped.linears
        if layer is not None and config.has_experts(layer)
    }
    residents = {resident_file_name(layer): _resident_file(mapped, layer, codecs, suffix) for layer in mapped.linears}
    encoder, note = select_encoder(kernels)
    return ConversionPlan(checkpoint, mapped, recipe, hf_config, layout, layers, residents, encoder, note)


def _resident_file(mapped: CheckpointMap, layer: int | None, codecs: dict[str, str], suffix: str) -> ResidentFile:
    linears = tuple((linear, get_codec(codecs[linear.module])) for linear in mapped.linears[layer])
    slots: list[TensorSlot] = []
    for linear, codec in linears:
        slots += linear_slots(linear, codec, suffix)
    slots += [(info.name, info.dtype, info.shape) for info in mapped.kept[layer]]
    kept = tuple(info.name for info in mapped.kept[layer])
    return ResidentFile(resident_file_name(layer), layer, linears, kept, tuple(slots))


def linear_slots(linear: Linear, codec: Codec, suffix: str) -> list[TensorSlot]:
    """The tensors that hold `linear` in a store whose scales are called `suffix`."""
    parts = codec.parts(linear.rows, linear.cols)
    slots: list[TensorSlot] = [
        (f"{linear.module}.{disk_suffix(part.suffix, suffix)}", part.dtype, part.shape) for part in parts
    ]
    for name, tensor in codec.companions(linear.rows, linear.cols).items():
        slots.append((f"{linear.module}.{name}", tensor.dtype, tuple(tensor.shape)))
    return slots


def small_files(plan: ConversionPlan) -> dict[str, bytes]:
    """The text files of the store: config, index, and the source's tokenizer files verbatim."""
    total = sum(plan.file_sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(plan.tensor_names())}
    return {
        CONFIG_NAME: (json.dumps(plan.store_config, indent=2, sort_keys=True) + "\n").encode(),
        INDEX_NAME: (json.dumps(index, indent=2, sort_keys=True) + "\n").encode(),
        **plan.checkpoint.side_files(),
    }


def files_present(directory: Path, names: Iterable[str]) -> dict[str, int]:
    """Bytes on disk already taken by the files called `names`, finished or partial."""
    present = {}
    for name in names:
        for path in (directory / name, directory / (name + PARTIAL)):
            try:
                present[name] = path.stat().st_blocks * 512
            except FileNotFoundError:
                continue
            break
    return present
