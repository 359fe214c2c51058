"""What is in a checkpoint or a store: sizes, codecs, parameters per component, and the error quantization left.

Owns counting and the tables for people. Reads headers and manifests only, never weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from convert.error_table import ErrorTable
from convert.journal import FOLDER
from convert.listing import save_listing
from convert.mapping import kept_shapes, linear_shapes, map_checkpoint
from convert.packed import packed_codec
from convert.source import Checkpoint, open_source
from offload.config import ModelConfig
from offload.errors import StoreError, UsageError
from offload.store import Store
from offload.store.manifest import MANIFEST_NAME
from offload.types import format_size

COMPONENTS = (
    "embedding",
    "head",
    "norms",
    "attention",
    "dense MLP",
    "shared experts",
    "routers",
    "routed experts",
    "MTP",
)
"""The parts of a model, in the order of the tables. MTP is in stores that were made with --mtp."""

_DTYPES = {torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass
class Component:
    """A part of the model: parameters without scales, bytes with them, codecs or dtypes of its weights."""

    parameters: int = 0
    nbytes: int = 0
    codecs: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Inspection:
    """The answer of `inspect`."""

    path: str
    kind: str
    config: ModelConfig
    components: dict[str, Component]
    files: int
    tensors: int
    source: dict[str, Any]
    expert_nbytes: int
    quant_method: str | None
    """What config.json tells other engines; None for plain floats."""
    errors: ErrorTable | None = None

    @property
    def parameters(self) -> int:
        """Parameters of the model, without multi-token prediction."""
        return sum(item.parameters for name, item in self.components.items() if name != "MTP")

    @property
    def active_parameters(self) -> int:
        """Parameters that one token is multiplied with: no embedding, num_experts_per_tok of the routed experts."""
        routed = self.components["routed experts"].parameters
        used = routed * self.config.num_experts_per_tok // self.config.n_routed_experts
        return self.parameters - routed + used - self.components["embedding"].parameters

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for item in self.components.values())

    def lines(self) -> list[str]:
        """The tables for people."""
        config = self.config
        moe = len(config.moe_layers)
        per_token = format_size(self.expert_nbytes * moe * config.num_experts_per_tok)
        lines = [
            f"{self.path}: {self.kind} of {config.model_type}, {self.tensors} tensors in {self.files} files, "
            f"{format_size(self.nbytes)}",
            f"made of {self.source['name']} ({self.source['revision']})" if self.kind == "store" else "",
            f"{config.num_hidden_layers} layers, {moe} with {config.n_routed_experts} routed experts of "
            f"{config.expert_parameters / 1e6:.2f} M parameters and {format_size(self.expert_nbytes)}; "
            f"{config.num_experts_per_tok} per layer and token: {per_token} per token",
            f"quant_method in config.json: {self.quant_method or 'none'}",
            f"{_count(self.parameters)} parameters, {_count(self.active_parameters)} active per token",
            f"{'component':<16}{'parameters':>12}{'size':>12}{'bits':>7}  format",
        ]
        for name, item in self.components.items():
            if item.nbytes:
                bits = 8 * item.nbytes / item.parameters
                codecs = ", ".join(sorted(item.codecs))
                size = format_size(item.nbytes)
                lines.append(f"{name:<16}{_count(item.parameters):>12}{size:>12}{bits:>7.2f}  {codecs}")
        if self.errors:
            lines += ["", *self.errors.lines()]
        return [line for line in lines if line]

    def to_dict(self) -> dict[str, Any]:
        """The same for machines."""
        values: dict[str, Any] = {
            "path": self.path,
            "kind": self.kind,
            "model_type": self.config.model_type,
            "num_hidden_layers": self.config.num_hidden_layers,
            "moe_layers": len(self.config.moe_layers),
            "n_routed_experts": self.config.n_routed_experts,
            "expert_bytes": self.expert_nbytes,
            "source": self.source,
            "files": self.files,
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "quant_method": self.quant_method,
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
            "components": {
                name: {"parameters": item.parameters, "bytes": item.nbytes, "formats": sorted(item.codecs)}
                for name, item in self.components.items()
            },
        }
        if self.errors:
            values |= self.errors.to_dict()
        return values


def inspect(
    path: str | Path,
    *,
    errors: bool = False,
    html: str | Path | None = None,
    revision: str | None = None,
    listing: str | Path | None = None,
) -> Inspection:
    """Describe the store, folder, header listing or hub repository `path`.

    `errors` adds what quantization cost (stores only); `html` also writes that as a page with charts. `listing` is a
    file that gets the header listing (checkpoints only).
    """
    directory = Path(path)
    if html is not None and not errors:
        raise UsageError("--html shows quantization errors; give --errors too")
    if (directory / MANIFEST_NAME).exists() or (directory / FOLDER).exists():
        if listing is not None:
            raise UsageError(f"{path} is a store: a header listing is made of a checkpoint")
        found = _inspect_store(directory, errors)
        if found.errors and html is not None:
            (codec,) = found.components["routed experts"].codecs
            found.errors.page(f"Errors of {directory.resolve().name}", codec).write(html)
        return found
    if errors:
        raise UsageError(f"{path} is a checkpoint: only a store has quantization errors to show")
    source = open_source(path, revision)
    try:
        checkpoint = Checkpoint(source)
        if listing is not None:
            save_listing(checkpoint, listing)
        return _inspect_source(checkpoint)
    finally:
        source.close()


def _inspect_source(checkpoint: Checkpoint) -> Inspection:
    config = ModelConfig.from_hf(checkpoint.config)
    packed = packed_codec(checkpoint.config, checkpoint.source.name)
    mapped = map_checkpoint(checkpoint, config, packed=packed)
    components = parameter_counts(config)
    left_out = {info.name for info in mapped.left_out}
    for name, info in checkpoint.tensors.items():
        item = components["MTP" if name in left_out else component(name)]
        item.nbytes += info.nbytes
        if name.endswith("weight_packed") and packed is not None:
            item.codecs.add(packed.name)
        elif not name.endswith(("_scale_inv", "weight_scale", "weight_shape")):
            item.codecs.add(_DTYPES.get(info.dtype, str(info.dtype)))
            item.parameters += prod(info.shape) if name in left_out else 0
    expert = next(iter(mapped.experts.values()), {})
    source = checkpoint.source
    return Inspection(
        path=source.name,
        kind="checkpoint",
        config=config,
        components=components,
        files=len({info.file for info in checkpoint.tensors.values()}),
        tensors=len(checkpoint.tensors),
        source={"name": source.name, "revision": source.revision},
        expert_nbytes=sum(linear.nbytes for linear in expert.values()),
        quant_method=config.quant_method,
    )


def _inspect_store(directory: Path, errors: bool) -> Inspection:
    if not (directory / MANIFEST_NAME).exists():
        raise StoreError(f"{directory}: the conversion into it is not finished; run the same convert command again")
    store = Store.open(directory)
    config = store.config
    components = parameter_counts(config)
    tensors = 0
    for header in store.resident_headers.values():
        for name, entry in header.tensors.items():
            item = components["MTP" if _layer(name) in config.mtp_layers else component(name)]
            item.nbytes += entry.nbytes
            tensors += 1
            module = name.rsplit(".", 1)[0]
            if name.endswith((".weight", ".weight_packed", "_bias")):
                dtype = _DTYPES.get(entry.dtype, str(entry.dtype))
                item.codecs.add(store.manifest.resident_codecs.get(module, dtype))
    for layer in store.manifest.layers:
        file = store.layer_file(layer)
        item = components["MTP" if layer in config.mtp_layers else "routed experts"]
        item.nbytes += file.nbytes - file.data_start
        item.codecs.add(store.layout.codec.name)
        tensors += sum(1 for _ in file.tensors())
    components["MTP"].parameters = _mtp_parameters(store)
    return Inspection(
        path=str(directory),
        kind="store",
        config=config,
        components=components,
        files=len(store.manifest.tensors) + len(store.manifest.layers),
        tensors=tensors,
        source=dict(store.manifest.source),
        expert_nbytes=store.layout.stride,
        quant_method=config.quant_method,
        errors=ErrorTable.of(store.manifest) if errors else None,
    )


def component(tensor: str) -> str:
    """The component that the tensor called `tensor` belongs to."""
    if tensor.startswith("model.embed_tokens."):
        return "embedding"
    if tensor.startswith("lm_head."):
        return "head"
    if re.search(r"norm\.weight$", tensor):
        return "norms"
    for part, name in (
        (".self_attn.", "attention"),
        (".mlp.experts.", "routed experts"),
        (".mlp.shared_experts.", "shared experts"),
        (".mlp.gate.", "routers"),
    ):
        if part in tensor:
            return name
    return "dense MLP"


def _layer(tensor: str) -> int | None:
    """The decoder layer in the name of `tensor`."""
    match = re.match(r"model\.layers\.(\d+)\.", tensor)
    return int(match[1]) if match else None


def _mtp_parameters(store: Store) -> int:
    """Parameters of the multi-token-prediction layers that `store` holds."""
    config, total = store.config, 0
    for layer in config.mtp_layers:
        there = store.manifest.resident_codecs
        total += sum(prod(shape) for module, shape in linear_shapes(config, layer) if module in there)
        total += sum(prod(shape) for _, shape in kept_shapes(config, layer))
        total += config.n_routed_experts * config.expert_parameters if config.has_experts(layer) else 0
    return total


def parameter_counts(config: ModelConfig) -> dict[str, Component]:
    """All components with the parameters that the config implies."""
    components = {name: Component() for name in COMPONENTS}
    for name, shape in _shapes(config):
        components[component(name)].parameters += prod(shape)
    experts = len(config.moe_layers) * config.n_routed_experts
    components["routed experts"].parameters = experts * config.expert_parameters
    return components


def _shapes(config: ModelConfig) -> Iterator[tuple[str, Iterable[int]]]:
    for layer in (None, *range(config.num_hidden_layers)):
        yield from ((f"{module}.weight", shape) for module, shape in linear_shapes(config, layer))
        yield from kept_shapes(config, layer)


def _count(parameters: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if parameters >= size:
            return f"{parameters / size:.2f} {unit}"
    return str(parameters)
