"""Resident weights: every format against exact arithmetic. Run by test_interpreted.py and test_cuda.py."""

from __future__ import annotations

import pytest
import torch
from on_device import DEVICE, KERNELS, close, draw, same, weight
from torch import Tensor

from offload.kernels.device import FEW_TOKENS
from offload.quant import QuantizedTensor

CODECS = ("int4-g32", "int4-g128", "int8-g128", "fp8", "fp8-b32x32", "bf16", "nf4-b64", "int3-g32", "int2-g32")
SIZES = [(7, 77), (9, 260)]  # odd everywhere; groups and blocks that end early
WHOLE = (10, 192)
"""Rows of whole blocks, without which nf4 is decoded before."""


@pytest.mark.parametrize(
    ("codec", "rows", "cols"), [(c, *size) for c in CODECS for size in (*SIZES, *([WHOLE] if c == "nf4-b64" else []))]
)
@pytest.mark.parametrize("tokens", [1, 5])
def test_linear(codec: str, rows: int, cols: int, tokens: int) -> None:
    _check_linear(codec, rows, cols, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("rows", "cols"), [*SIZES, WHOLE, (64, 128), (576, 512), (1, 2), (5, 1031), (4097, 96)])
@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 16, 17, 33, 64, 65])
def test_linear_in_all_sizes(codec: str, rows: int, cols: int, tokens: int) -> None:
    _check_linear(codec, rows, cols, tokens)


def _check_linear(codec: str, rows: int, cols: int, tokens: int) -> None:
    w, x = weight(rows, cols, codec), draw(tokens, cols, seed=1)
    out = KERNELS.linear(x, w)
    assert out.device == x.device
    if tokens > FEW_TOKENS:  # bf16 factors, weights rounded once
        close(out, x.bfloat16().double() @ w.dequantize().double().T, 2e-6)
    else:  # nothing is rounded, but what the kernels do not read as it lies
        decoded_before = ("fp8" in codec and cols % 4) or ("nf4" in codec and cols % 64)
        known = (2e-3, torch.bfloat16) if decoded_before else (2e-6, torch.float32)
        close(out, x.double() @ w.dequantize(known[1]).double().T, known[0])


def test_every_bit_pattern_of_fp8() -> None:
    """All finite e4m3 values, subnormals and negative zero included, on both paths."""
    w = weight(8, 256, "fp8")
    codes = torch.arange(256, dtype=torch.uint8).repeat(8, 1).roll(3, 1)
    codes[codes % 128 == 127] = 1  # NaN
    w.parts["weight"].copy_(codes.view(torch.float8_e4m3fn))
    w.parts["weight_scale"].fill_(1.0)
    _check_columns(w, codes.view(torch.float8_e4m3fn).double())


def test_every_code_of_nf4() -> None:
    w = weight(8, 256, "nf4-b64")
    w.parts["weight"].copy_(torch.arange(256, dtype=torch.uint8).repeat(4).view(-1, 1))
    w.parts["weight.absmax"].fill_(1.0)
    _check_columns(w, w.dequantize(torch.float32).double(), rounded=True)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_code_of_the_integer_formats(bits: int) -> None:
    w = weight(8, 256, f"int{bits}-g128")
    codes = (torch.arange(256) % 2**bits - 2 ** (bits - 1)).repeat(8, 1).roll(3, 1)
    w.parts["weight_packed"].copy_(w.codec.pack(codes.to(torch.int8)))  # type: ignore[attr-defined]
    w.parts["weight_scale"].fill_(0.5)
    _check_columns(w, codes.double() * 0.5)


def _check_columns(w: QuantizedTensor, exact: Tensor, rounded: bool = False) -> None:
    """Unit vectors give back the columns of the weight; `rounded`: many of them as the bf16 that tensor cores see."""
    unit, exact = torch.eye(256, device=DEVICE), exact.cpu()
    many = exact.bfloat16().double() if rounded else exact
    assert torch.equal(KERNELS.linear(unit, w).double().cpu(), many.T)
    for column in (0, 1, 2, 3, 6, 7, 131, 255):
        got = KERNELS.linear(unit[column : column + 1], w)
        assert torch.equal(got.double().cpu(), exact.T[column : column + 1])


@pytest.mark.parametrize("codec", ["int4-g32", "int8-g128", "fp8", "bf16", "int3-g32"])
def test_a_row_does_not_see_the_others(codec: str) -> None:
    w, x = weight(12, 96, codec), draw(70, 96, seed=2)
    few, many = KERNELS.linear(x[:FEW_TOKENS], w), KERNELS.linear(x, w)
    for t in range(FEW_TOKENS):
        assert torch.equal(KERNELS.linear(x[t : t + 1], w), few[t : t + 1])
    shuffled = torch.randperm(70, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    same(KERNELS.linear(x[shuffled].contiguous(), w), many[shuffled])


@pytest.mark.parametrize("codecs", [("int8-g128", "int8-g128", "int8-g128"), ("int4-g32", "fp8", "bf16")])
@pytest.mark.parametrize("tokens", [2, 6])
def test_swiglu_mlp(codecs: tuple[str, str, str], tokens: int) -> None:
    gate, up, down = weight(12, 32, codecs[0]), weight(12, 32, codecs[1], 1), weight(32, 12, codecs[2], 2)
    x = draw(tokens, 32)
    g, u = (x.double() @ w.dequantize(torch.float32).double().T for w in (gate, up))
    wanted = torch.nn.functional.silu(g) * u @ down.dequantize(torch.float32).double().T
    close(KERNELS.swiglu_mlp(x, gate, up, down), wanted, 1e-2 if tokens > FEW_TOKENS else 3e-6)


@pytest.mark.parametrize("codec", ["int8-g128", "int4-g32", "fp8", "bf16", "nf4-b64", "int3-g32", "int2-g32"])
@pytest.mark.parametrize(
    ("heads", "nope", "value", "rank"), [(2, 5, 7, 52), pytest.param(3, 16, 24, 64, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("tokens", [1, 6])
def test_absorption(codec: str, heads: int, nope: int, value: int, rank: int, tokens: int) -> None:
    rank = 64 if codec == "nf4-b64" else rank
    kv_b = weight(heads * (nope + value), rank, codec)
    few = tokens <= FEW_TOKENS
    w = kv_b.dequantize(torch.float32 if few else torch.bfloat16).double().unflatten(0, (heads, nope + value))
    q, u = draw(tokens, heads, nope, seed=1), draw(tokens, heads, rank, seed=2)
    a, b = (q, u) if few else (q.bfloat16(), u.bfloat16())
    close(KERNELS.absorb_query(q, kv_b), torch.einsum("thn,hnr->thr", a.double(), w[:, :nope]), 3e-6)
    close(KERNELS.expand_value(u, kv_b, value), torch.einsum("thr,hvr->thv", b.double(), w[:, nope:]), 3e-6)
