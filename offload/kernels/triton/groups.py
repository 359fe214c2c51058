"""Routed experts out of a slab, for steps of many tokens: positions grouped by slot, one tile per group part.

Owns gate|up with SiLU, and down, as grouped matrix products, and the table that tells each tile its slot, for
where it is made on the device; the host then only knows an upper bound for the number of tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.kernels.device import Groups
from offload.kernels.triton.dot import bf16
from offload.kernels.triton.rows import INT4, NF4
from offload.kernels.triton.tiles import tile_products
from offload.types import ceil_div


def group_positions(slots: Tensor, count: int, size: int) -> Groups:
    """Groups of the positions of slots int32 [P] (-1: none) in tiles of `size`; a slab has `count` slots."""
    positions = slots.numel()
    tiles = ceil_div(positions, size) + min(count, positions)
    ordered, order = torch.sort(slots, stable=True)
    edges = torch.searchsorted(ordered, torch.arange(count + 1, dtype=slots.dtype, device=slots.device))
    begin, end = edges[:-1], edges[1:]
    last_tile = torch.cumsum((end - begin + size - 1) // size, 0)  # [count], one past each slot's tiles
    tile = torch.arange(tiles, device=slots.device)
    slot = torch.searchsorted(last_tile, tile, right=True)
    used = slot < count
    slot = slot.clamp(max=count - 1)
    before = torch.cat((last_tile.new_zeros(1), last_tile[:-1]))
    first = begin[slot] + (tile - before[slot]) * size
    return Groups(
        order.to(torch.int32),
        torch.where(used, slot, -1).to(torch.int32),
        first.to(torch.int32),
        end[slot].to(torch.int32),
        tiles,
    )


@triton.jit
def grouped_gate_up_kernel(
    raw_ptr,
    scale_ptr,
    order_ptr,
    slot_ptr,
    first_ptr,
    end_ptr,
    x_ptr,
    h_ptr,
    pitch_raw,
    pitch_scales,
    gate_raw,
    up_raw,
    gate_scales,
    up_scales,
    rows,
    cols,
    part,
    x_width,
    h_part,
    h_width,
    row_bytes,
    scale_cols,
    top_k,
    aid,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """h[p] = silu(gate x[p // top_k]) * (up x[p // top_k]) in bf16, in the order in which down reads it."""
    tile = tl.program_id(1)
    slot = tl.load(slot_ptr + tile).to(tl.int64)
    if slot < 0:
        return
    index = tl.load(first_ptr + tile) + tl.arange(0, M)
    m_mask = index < tl.load(end_ptr + tile)
    p = tl.load(order_ptr + index, mask=m_mask, other=0)
    x_at = (p // top_k).to(tl.int64) * x_width
    p = p.to(tl.int64)
    n = tl.program_id(0) * N + tl.arange(0, N)
    raw_ptr += slot * pitch_raw
    scale_ptr += slot * pitch_scales
    scale_at = n // BLOCK_ROWS * scale_cols
    gate = tile_products(
        raw_ptr, gate_raw + n * row_bytes, scale_ptr, gate_scales + scale_at, n < rows,
        x_ptr, x_at, m_mask, cols, part, aid, KIND, GROUP, M, N, K,
    )  # fmt: skip
    up = tile_products(
        raw_ptr, up_raw + n * row_bytes, scale_ptr, up_scales + scale_at, n < rows,
        x_ptr, x_at, m_mask, cols, part, aid, KIND, GROUP, M, N, K,
    )  # fmt: skip
    h = gate / (1.0 + tl.exp(-gate)) * up
    at = n % 2 * h_part + n // 2 if (KIND == INT4 or KIND == NF4) else n
    tl.store(h_ptr + p[:, None] * h_width + at[None, :], bf16(h), mask=m_mask[:, None] & (n < rows)[None, :])


@triton.jit
def grouped_down_kernel(
    raw_ptr,
    scale_ptr,
    order_ptr,
    slot_ptr,
    first_ptr,
    end_ptr,
    h_ptr,
    partial_ptr,
    pitch_raw,
    pitch_scales,
    down_raw,
    down_scales,
    rows,
    cols,
    h_part,
    h_width,
    row_bytes,
    scale_cols,
    aid,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """partial[p] = down h[p]."""
    tile = tl.program_id(1)
    slot = tl.load(slot_ptr + tile).to(tl.int64)
    if slot < 0:
        return
    index = tl.load(first_ptr + tile) + tl.arange(0, M)
    m_mask = index < tl.load(end_ptr + tile)
    p = tl.load(order_ptr + index, mask=m_mask, other=0).to(tl.int64)
    n = tl.program_id(0) * N + tl.arange(0, N)
    out = tile_products(
        raw_ptr + slot * pitch_raw, down_raw + n * row_bytes,
        scale_ptr + slot * pitch_scales, down_scales + n // BLOCK_ROWS * scale_cols, n < rows,
        h_ptr, p * h_width, m_mask, cols, h_part, aid, KIND, GROUP, M, N, K,
    )  # fmt: skip
    tl.store(partial_ptr + p[:, None] * rows + n[None, :], out, mask=m_mask[:, None] & (n < rows)[None, :])
