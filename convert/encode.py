"""Turns tensors of a checkpoint into tensors of a store: one routed expert, one file of resident tensors.

Owns the work on one unit, between reading it and writing it. Deterministic, so that converting and repairing give
the same bytes. Must not know journals nor threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import replace

import torch
from torch import Tensor

from convert.encoder import Encoded
from convert.mapping import Linear
from convert.plan import ConversionPlan, ResidentFile, linear_slots
from convert.requantize import count_no_numbers, requantize
from convert.source import Checkpoint, TensorInfo, as_tensor
from offload.errors import CheckpointError
from offload.quant import Codec
from offload.store.hf_config import scale_suffix
from offload.store.layout import disk_suffix
from offload.types import PROJECTIONS, ExpertId

_CHUNK = 16 << 20  # bytes of a tensor copied at a time

EncodedExpert = tuple[dict[str, dict[str, Tensor]], tuple[float, float, float]]
"""Raw tensors by projection and suffix, and the relative RMSE of gate, up and down projection."""


def load_expert(plan: ConversionPlan, expert: ExpertId) -> dict[str, Tensor]:
    """The source's tensors of `expert`, by name."""
    linears = plan.mapped.experts[expert].values()
    return plan.checkpoint.load(name for linear in linears for name in linear.names)


def encode_expert(plan: ConversionPlan, expert: ExpertId, tensors: Mapping[str, Tensor]) -> EncodedExpert:
    """Raw tensors of `expert` by projection and suffix, and the relative RMSE of each projection."""
    parts: dict[str, dict[str, Tensor]] = {}
    errors: list[float] = []
    for projection in PROJECTIONS:
        linear = plan.mapped.experts[expert][projection]
        done = _encoded(plan, linear, tensors, plan.layout.codec)
        parts[projection] = done.parts
        errors.append(done.error)
    gate, up, down = errors
    return parts, (gate, up, down)


def encode_resident(
    plan: ConversionPlan, file: ResidentFile, only: Set[str] | None = None
) -> Iterator[tuple[str, Iterator[Tensor]]]:
    """(name in the store, consecutive parts of its data) for every tensor of `file`, or for those in `only`."""
    suffix = scale_suffix(plan.store_config)
    for linear, codec in file.linears:
        names = {name for name, _, _ in linear_slots(linear, codec, suffix)}
        if only is None or names & only:
            encoded = _encode_linear(plan, linear, codec, suffix)
            yield from ((name, chunks) for name, chunks in encoded if only is None or name in only)
    for name in file.kept:
        if only is not None and name not in only:
            continue
        info = plan.checkpoint.info(name)
        yield name, _copy(plan.checkpoint, info, info.dtype)


def _encode_linear(
    plan: ConversionPlan, linear: Linear, codec: Codec, suffix: str
) -> Iterator[tuple[str, Iterator[Tensor]]]:
    specs = codec.parts(linear.rows, linear.cols)
    if codec.name == "bf16" and linear.scale is None:
        yield f"{linear.module}.weight", _copy(plan.checkpoint, linear.weight, torch.bfloat16)
        return
    strips = _encode_strips(plan, linear, codec)
    later: dict[str, list[Tensor]] = {spec.suffix: [] for spec in specs[1:]}

    def payload() -> Iterator[Tensor]:
        for parts in strips:
            for item, kept in later.items():
                kept.append(parts[item])
            yield parts[specs[0].suffix]

    def scales(item: str) -> Iterator[Tensor]:
        for _ in payload():  # when nobody asked for the payload
            pass
        yield from later[item]

    # The payload is written strip by strip; scales are small and wait until it is through.
    yield f"{linear.module}.{disk_suffix(specs[0].suffix, suffix)}", payload()
    for item in later:
        yield f"{linear.module}.{disk_suffix(item, suffix)}", scales(item)
    for item, tensor in codec.companions(linear.rows, linear.cols).items():
        yield f"{linear.module}.{item}", iter((tensor,))


def _encoded(plan: ConversionPlan, linear: Linear, tensors: Mapping[str, Tensor], codec: Codec) -> Encoded:
    """`linear` in the bytes of `codec`; a fault names the shard that has to be fetched again."""
    try:
        return requantize(linear, tensors, plan.mapped.block, codec, plan.recipe.scales, plan.encoder)
    except CheckpointError as fault:
        where = plan.checkpoint.source.where(linear.weight.file)
        raise CheckpointError(f"{where}: {fault}; if the shard is damaged, fetch it again") from None


def _encode_strips(plan: ConversionPlan, linear: Linear, codec: Codec) -> Iterator[dict[str, Tensor]]:
    """The raw tensors of `linear`, some rows at a time: a head of 1.9 GB never is in memory as a whole."""
    if linear.scale is not None:  # FP8 weights are small enough, and their scales are ragged
        tensors = plan.checkpoint.load(linear.names)
        yield _encoded(plan, linear, tensors, codec).parts
        return
    info = linear.weight
    row = info.nbytes // linear.rows
    step = max(1, _CHUNK // row // codec.row_unit) * codec.row_unit
    for first in range(0, linear.rows, step):
        rows = min(step, linear.rows - first)
        raw = plan.checkpoint.source.read_array(info.file, info.offset + first * row, rows * row)
        part = TensorInfo(info.name, info.file, info.dtype, (rows, linear.cols), 0, rows * row)
        strip = replace(linear, rows=rows, weight=part)
        tensors = {info.name: as_tensor(raw, part)}
        yield _encoded(plan, strip, tensors, codec).parts


def _copy(checkpoint: Checkpoint, info: TensorInfo, dtype: torch.dtype) -> Iterator[Tensor]:
    """The tensor as `dtype`, in chunks: an embedding of 1.9 GB never is in memory as a whole."""
    step = _CHUNK // info.dtype.itemsize * info.dtype.itemsize
    for at in range(0, info.nbytes, step):
        nbytes = min(step, info.nbytes - at)
        raw = checkpoint.source.read_array(info.file, info.offset + at, nbytes)
        count = nbytes // info.dtype.itemsize
        part = as_tensor(raw, TensorInfo(info.name, info.file, info.dtype, (count,), 0, nbytes))
        if count_no_numbers(part):
            where = checkpoint.source.where(info.file)
            raise CheckpointError(
                f"{where}: {info.name} holds NaN or infinite values; if the shard is damaged, fetch it again"
            )
        yield part.to(dtype)
