"""Products with resident weights: which kernel, in which blocks.

Owns the choice by shapes and number of tokens alone, never by timing: `FEW_TOKENS` rows or fewer go through
CUDA cores, each as if it were alone; more go through tensor cores. So a row's bits depend on that row and
on which of the two a step takes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from offload.errors import KernelError
from offload.kernels.device import FEW_TOKENS
from offload.kernels.triton import absorb, rows, tiles
from offload.kernels.triton.formats import Format, Packed, pack
from offload.kernels.triton.launch import Launcher
from offload.kernels.triton.rows import INT8, NF4
from offload.quant import QuantizedTensor, get_codec
from offload.types import ceil_div


def row_blocks(row_count: int) -> dict[str, int]:
    """Rows and units of 16 bytes per program of the kernels on words.

    A matrix of few rows is cut finer, with all four warps along a row, so that there are programs for every
    multiprocessor and each has at least 8 KiB on its way.
    """
    if row_count >= 4096:
        return {"N": 16, "UNITS": 32, "num_warps": 4}
    return {"N": 4, "UNITS": 128, "num_warps": 4}


def tile_blocks(tokens: int) -> dict[str, int]:
    """Tile of the kernels on tensor cores for a step of `tokens` tokens."""
    if tokens <= 16:
        return {"M": 16, "N": 32, "K": 128, "num_warps": 4, "num_stages": 3}
    if tokens <= 64:
        return {"M": 32, "N": 64, "K": 128, "num_warps": 4, "num_stages": 3}
    return {"M": 128, "N": 64, "K": 64, "num_warps": 8, "num_stages": 3}


def packed(weight: QuantizedTensor) -> Packed:
    """`weight` for the kernels; what they do not read as it lies is decoded to bf16 for this call."""
    form = pack(weight)
    if form is not None:
        return form
    dense = pad(weight.dequantize(), (0, weight.cols % 2)).contiguous()
    plain = QuantizedTensor(get_codec("bf16"), weight.rows, dense.shape[1], {"weight": dense})
    form = pack(plain)
    assert form is not None
    return form


def activations(x: Tensor, form: Format) -> tuple[Tensor, int]:
    """x [T, .., K] as tensor-core kernels read it: bf16, for int4 and nf4 the even columns before the odd ones.

    Returns it with the number of elements of one part.
    """
    x = x.to(torch.bfloat16)
    if not form.halves:
        return x.contiguous(), x.shape[-1]
    x = pad(x, (0, x.shape[-1] % 2))
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2).contiguous(), x.shape[-1] // 2


def product(
    launch: Launcher, x: Tensor, weight: Packed, heads: int = 1, head_rows: int = 0, first_row: int = 0
) -> Tensor:
    """out[t, h, n] = W[h * head_rows + first_row + n] . x[t, h]; x [T, heads, K], or [T, K] for one head."""
    tokens = x.shape[0]
    if weight.cols != x.shape[-1]:
        x = pad(x, (0, weight.cols - x.shape[-1]))
    count = head_rows - first_row if heads > 1 or head_rows else weight.rows
    out = torch.empty((*x.shape[:-1], count), dtype=torch.float32, device=x.device)
    form, cols = weight.format, weight.cols
    scale_cols = form.scale_cols(cols)
    if tokens <= FEW_TOKENS:
        blocks = row_blocks(count * heads)
        if form.kind == INT8.value and blocks["N"] == 16:
            blocks["maxnreg"] = 80  # for sm_80 the compiler would rather spill eight bytes than use more than 72
        grid = (tokens * heads, ceil_div(count, blocks["N"]))
        launch(
            rows.rows_kernel, grid, weight.words, weight.scale, x, out,
            count, cols, form.row_words(cols), scale_cols, heads, head_rows, first_row, form.aid(x.device),
            **form.rows_meta, **blocks,
        )  # fmt: skip
        return out
    blocks = tile_blocks(tokens)
    a, part = activations(x, form)
    tiled = (ceil_div(tokens, blocks["M"]), ceil_div(count, blocks["N"]), heads)
    launch(
        tiles.tiles_kernel, tiled, weight.raw, weight.scale, a, out,
        tokens, count, cols, part, a.shape[-1], form.raw_row(cols), scale_cols, heads, head_rows, first_row,
        form.aid(x.device), **form.tiles_meta, **blocks,
    )  # fmt: skip
    return out


def mlp_hidden(launch: Launcher, x: Tensor, gate: Packed, up: Packed) -> Tensor:
    """silu(gate x) * (up x) for a few tokens, in one launch; both weights have one format and shape."""
    form, cols, count = gate.format, gate.cols, gate.rows
    blocks = row_blocks(count)
    h = torch.empty((x.shape[0], count), dtype=torch.float32, device=x.device)
    launch(
        rows.mlp_kernel, (x.shape[0], ceil_div(count, blocks["N"])),
        gate.words, gate.scale, up.words, up.scale, x, h,
        count, cols, form.row_words(cols), form.scale_cols(cols), form.aid(x.device), **form.rows_meta, **blocks,
    )  # fmt: skip
    return h


def into_latent(launch: Launcher, q: Tensor, weight: Packed) -> Tensor:
    """q [T, heads, nope] times the first `nope` rows of each head's part of `weight` [.., R]: [T, heads, R]."""
    tokens, heads, nope = q.shape
    form, rank, head_rows = weight.format, weight.cols, weight.rows // heads
    out = torch.empty((tokens, heads, rank), dtype=torch.float32, device=q.device)
    depth = _power_of_two(nope)
    if depth > 256:
        raise KernelError(f"qk_nope_head_dim {nope} is larger than the 256 that device kernels take")
    if tokens <= FEW_TOKENS:
        width = 32
        columns = form.row_words(rank) if form.bits >= 4 else rank
        launch(
            absorb.absorb_rows_kernel, (tokens * heads, ceil_div(columns, width)),
            weight.words, weight.scale, q, out,
            heads, nope, head_rows, rank, form.row_words(rank), form.scale_cols(rank), form.aid(q.device),
            **form.rows_meta, N=depth, W=width, num_warps=4,
        )  # fmt: skip
        return out
    tile_m = 16 if tokens <= 16 else 64
    width = 32 if form.kind == NF4.value else 64  # values that are looked up take registers
    columns = ceil_div(rank, 2) if form.halves else rank
    launch(
        absorb.absorb_tiles_kernel, (ceil_div(tokens, tile_m), ceil_div(columns, width), heads),
        weight.raw, weight.scale, q, out,
        tokens, heads, nope, head_rows, rank, form.raw_row(rank), form.scale_cols(rank), form.aid(q.device),
        **form.tiles_meta, M=tile_m, N=max(depth, 16), C=width, num_warps=8 if tile_m > 16 else 4,
    )  # fmt: skip
    return out


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
