"""Routed experts out of a slab: few tokens position by position, many tokens grouped by slot.

Owns the choice, by the number of tokens of the step alone, and the blocks. Neither path asks the device
for anything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offload.errors import KernelError
from offload.kernels.device import FEW_TOKENS, ExpertSlab, Groups, SlabLayout
from offload.kernels.triton import groups, slots
from offload.kernels.triton.formats import Format, PackedExperts, pack_experts
from offload.kernels.triton.launch import Launcher
from offload.kernels.triton.linear import activations, arrange
from offload.kernels.triton.rows import INT2, INT3, NF4
from offload.types import ceil_div


def slab_experts(launch: Launcher, slab: ExpertSlab, x: Tensor, slot_of: Tensor, partial: Tensor) -> None:
    """`DeviceKernels.slot_experts`."""
    parts = positions_of(slab.layout)
    if x.shape[0] <= FEW_TOKENS:
        _by_position(launch, slab, parts, x, slot_of, partial)
    else:
        _by_slot(launch, slab, parts, x, slot_of, partial)


def positions_of(layout: SlabLayout) -> PackedExperts:
    """Where the parts of an expert lie. Raises KernelError for experts that the kernels cannot read."""
    parts = pack_experts(layout)
    if parts is None:
        raise KernelError(
            f"device kernels cannot read {layout.codec.name} experts of {layout.hidden_size} x "
            f"{layout.moe_intermediate_size}, whose rows do not end with a block; use --device cpu or convert them to "
            "int4-g32"
        )
    return parts


def group_tile(form: Format, tokens: int) -> dict[str, int]:
    """Tile of the grouped products. About T * K / experts rows meet in a group."""
    # Values that are looked up or shifted out of their bytes one by one take registers, more than spill.
    part = 2 if form.kind in (NF4.value, INT3.value, INT2.value) else 1
    if tokens <= 512:
        return {"M": 16, "N": 64 // part, "K": 128, "num_warps": 4, "num_stages": 3}
    # So do the two sums that each of gate and up has where a byte holds two columns.
    part = max(part, 2 if form.halves else 1)
    return {"M": 64, "N": 64 // part, "K": 64, "num_warps": 4, "num_stages": 3}


POSITION_BLOCKS = {"UNITS": 32, "num_warps": 1}
"""Units and warps per program of the kernels by position: a warp with four rows. See `row_blocks`."""


def _by_position(
    launch: Launcher, slab: ExpertSlab, parts: PackedExperts, x: Tensor, slot_of: Tensor, partial: Tensor
) -> None:
    positions, top_k = slot_of.numel(), slot_of.numel() // x.shape[0]
    hidden, width = slab.layout.hidden_size, slab.layout.moe_intermediate_size
    words, scales = slab.data.view(torch.int32), slab.data.view(parts.up.scale_dtype)
    pitches = words.shape[1], scales.shape[1]
    at = {p: offset // 4 for p, offset in parts.payload.items()}
    h_width, h_cols = parts.down.x_width(width), parts.down.x_cols(width)
    h = torch.empty((positions, h_width), dtype=torch.float32, device=x.device)
    blocks = {"N": 2} | POSITION_BLOCKS  # of gate and of up
    launch(
        slots.gate_up_kernel, (ceil_div(h_cols, blocks["N"]), positions),
        words, scales, slot_of, arrange(launch, x, parts.up, hidden), h, *pitches,
        at["gate_proj"], at["up_proj"], parts.scale["gate_proj"], parts.scale["up_proj"],
        width, hidden, *_grid(parts.up, hidden), parts.down.x_words(width), h_width, h_cols,
        top_k, parts.up.aid(x.device), **parts.up.rows_meta, **blocks,
    )  # fmt: skip
    blocks = {"N": 4} | POSITION_BLOCKS
    launch(
        slots.down_kernel, (ceil_div(hidden, blocks["N"]), positions),
        words, scales, slot_of, h, partial, *pitches, at["down_proj"], parts.scale["down_proj"],
        hidden, width, *_grid(parts.down, width), parts.down.aid(x.device), **parts.down.rows_meta, **blocks,
    )  # fmt: skip


def _by_slot(
    launch: Launcher, slab: ExpertSlab, parts: PackedExperts, x: Tensor, slot_of: Tensor, partial: Tensor
) -> None:
    table = groups.group_positions(slot_of, slab.slots, group_tile(parts.up, x.shape[0])["M"])
    grouped_experts(launch, slab, activations(x, parts.up)[0], table, partial)


def grouped_experts(launch: Launcher, slab: ExpertSlab, a: Tensor, table: Groups, partial: Tensor) -> None:
    """`DeviceKernels.group_experts`; a [T, ..] are `activations`."""
    parts = positions_of(slab.layout)
    positions, top_k = table.order.numel(), table.order.numel() // a.shape[0]
    hidden, width = slab.layout.hidden_size, slab.layout.moe_intermediate_size
    tile = group_tile(parts.up, a.shape[0])
    part = a.shape[-1] // 2 if parts.up.halves else a.shape[-1]
    tables = table.order, table.slot, table.first, table.end
    raw, scales = slab.data.view(parts.up.raw_dtype), slab.data.view(parts.up.scale_dtype)
    pitches = raw.shape[1], scales.shape[1]
    at = {p: offset // parts.up.raw_dtype.itemsize for p, offset in parts.payload.items()}
    h_part = ceil_div(width, 2) if parts.down.halves else width
    h_width = 2 * h_part if parts.down.halves else width
    h = torch.empty((positions, h_width), dtype=torch.bfloat16, device=a.device)
    launch(
        groups.grouped_gate_up_kernel, (ceil_div(width, tile["N"]), table.tiles),
        raw, scales, *tables, a, h, *pitches,
        at["gate_proj"], at["up_proj"], parts.scale["gate_proj"], parts.scale["up_proj"],
        width, hidden, part, a.shape[-1], h_part, h_width,
        parts.up.raw_row(hidden), parts.up.scale_cols(hidden), top_k, parts.up.aid(a.device),
        **parts.up.tiles_meta, **tile,
    )  # fmt: skip
    launch(
        groups.grouped_down_kernel, (ceil_div(hidden, tile["N"]), table.tiles),
        raw, scales, *tables, h, partial, *pitches, at["down_proj"], parts.scale["down_proj"],
        hidden, width, h_part, h_width,
        parts.down.raw_row(width), parts.down.scale_cols(width), parts.down.aid(a.device),
        **parts.down.tiles_meta, **tile,
    )  # fmt: skip


def _grid(form: Format, cols: int) -> tuple[int, int, int, int]:
    return form.row_words(cols), form.scale_cols(cols), form.x_words(cols), form.x_width(cols)
