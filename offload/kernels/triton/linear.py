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
from offload.kernels.triton.rows import NF4
from offload.quant import QuantizedTensor, get_codec
from offload.types import ceil_div

ARRANGED = 1024
"""Columns per program of `arrange`."""


def row_blocks(rows: int, cols: int, form: Format) -> dict[str, int]:
    """Rows, units of 16 bytes and warps per program of the kernels on words.

    Many short programs hide the way of the bytes better than few long ones: a warp with a few rows each, as measured
    on an H200. Where rows are few, or long, four warps share them, so that there are programs for every
    multiprocessor.
    """
    if rows < 4096:
        return _blocks(2 if form.bits > 4 else 4, warps=4)
    if rows < 16384:
        return _blocks(2, warps=4 if cols > 8192 else 1)
    return _blocks(4, warps=1)


def _blocks(rows: int, warps: int) -> dict[str, int]:
    return {"N": rows, "UNITS": 32 * warps, "num_warps": warps}


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


def arrange(launch: Launcher, x: Tensor, form: Format, cols: int) -> Tensor:
    """x [.., cols] as the kernels on words read vectors: [V, x_width]."""
    width = form.x_width(cols)
    vectors, padded = x.numel() // x.shape[-1], form.x_cols(cols)
    out = torch.empty((vectors, width), dtype=torch.float32, device=x.device)
    launch(
        rows.arrange_kernel, (vectors, ceil_div(padded, ARRANGED)),
        x, out, x.shape[-1], padded, form.x_words(cols), width,
        KIND=form.kind, PER_WORD=form.per_word, C=ARRANGED, num_warps=4,
    )  # fmt: skip
    return out


def product(
    launch: Launcher, x: Tensor, weight: Packed, heads: int = 1, head_rows: int = 0, first_row: int = 0
) -> Tensor:
    """out[t, h, n] = W[h * head_rows + first_row + n] . x[t, h]; x [T, heads, K], or [T, K] for one head."""
    tokens = x.shape[0]
    count = head_rows - first_row if heads > 1 or head_rows else weight.rows
    out = torch.empty((*x.shape[:-1], count), dtype=torch.float32, device=x.device)
    form, cols = weight.format, weight.cols
    if tokens <= FEW_TOKENS:
        _arranged_product(launch, arrange(launch, x, form, cols), weight, out, heads, head_rows, first_row)
        return out
    if cols != x.shape[-1]:
        x = pad(x, (0, cols - x.shape[-1]))
    blocks = tile_blocks(tokens)
    a, part = activations(x, form)
    tiled = (ceil_div(tokens, blocks["M"]), ceil_div(count, blocks["N"]), heads)
    launch(
        tiles.tiles_kernel, tiled, weight.raw, weight.scale, a, out,
        tokens, count, cols, part, a.shape[-1], form.raw_row(cols), form.scale_cols(cols),
        heads, head_rows, first_row, form.aid(x.device), **form.tiles_meta, **blocks,
    )  # fmt: skip
    return out


def _arranged_product(
    launch: Launcher, x: Tensor, weight: Packed, out: Tensor, heads: int = 1, head_rows: int = 0, first_row: int = 0
) -> None:
    """`product` into `out` [.., rows] for the vectors x [T * heads, x_width], which are `arranged`."""
    form, cols, count = weight.format, weight.cols, out.shape[-1]
    blocks = row_blocks(count * heads, cols, form)
    launch(
        rows.rows_kernel, (x.shape[0], ceil_div(count, blocks["N"])), weight.words, weight.scale, x, out,
        count, cols, form.row_words(cols), form.scale_cols(cols), form.x_words(cols), form.x_width(cols),
        heads, head_rows, first_row, form.aid(x.device), **form.rows_meta, **blocks,
    )  # fmt: skip


def mlp(launch: Launcher, x: Tensor, gate: Packed, up: Packed, down: Packed) -> Tensor:
    """down(silu(gate x) * (up x)) for a few tokens, what lies between staying `arranged`; one format, gate like up."""
    form, cols, count, tokens = gate.format, gate.cols, gate.rows, x.shape[0]
    blocks = row_blocks(count, cols, form)
    h_width, h_cols = form.x_width(count), form.x_cols(count)
    h = torch.empty((tokens, h_width), dtype=torch.float32, device=x.device)
    launch(
        rows.mlp_kernel, (tokens, ceil_div(h_cols, blocks["N"])),
        gate.words, gate.scale, up.words, up.scale, arrange(launch, x, form, cols), h,
        count, cols, form.row_words(cols), form.scale_cols(cols), form.x_words(cols), form.x_width(cols),
        form.x_words(count), h_width, h_cols, form.aid(x.device), **form.rows_meta, **blocks,
    )  # fmt: skip
    out = torch.empty((tokens, down.rows), dtype=torch.float32, device=x.device)
    _arranged_product(launch, h, down, out)
    return out


def into_latent(launch: Launcher, q: Tensor, weight: Packed) -> Tensor:
    """q [T, heads, nope] times the first `nope` rows of each head's part of `weight` [.., R]: [T, heads, R]."""
    tokens, heads, nope = q.shape
    form, rank, head_rows = weight.format, weight.cols, weight.rows // heads
    out = torch.empty((tokens, heads, rank), dtype=torch.float32, device=q.device)
    depth = _power_of_two(nope)
    if depth > 256:
        raise KernelError(f"qk_nope_head_dim {nope} is larger than the 256 that device kernels take")
    if tokens <= FEW_TOKENS:
        width = 4  # one warp, whose lanes have rows of their own: sums and results never leave registers
        columns = form.row_words(rank) if form.bits >= 4 else rank
        launch(
            absorb.absorb_rows_kernel, (tokens * heads, ceil_div(columns, width)),
            weight.words, weight.scale, q, out,
            heads, nope, head_rows, rank, form.row_words(rank), form.scale_cols(rank), form.aid(q.device),
            **form.rows_meta, N=depth, W=width, num_warps=1,
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
