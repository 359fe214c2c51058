"""The compiled encoder gives the bytes of the torch reference, on every instruction set, for any shape and source."""

from __future__ import annotations

import pytest
import torch

from convert.encoder import NativeEncoder, ReferenceEncoder, decode, select_encoder
from offload.errors import CodecError, KernelError, UsageError
from offload.kernels.native_library import library_path
from offload.quant import get_codec
from offload.types import ceil_div

needs_library = pytest.mark.skipif(library_path() is None, reason="compiled kernels not built")
CODECS = ("int4-g32", "int4-g128", "int8-g128", "int8-g32", "int3-g32", "int3-g128", "int2-g32", "int2-g64")


def native(isa: str) -> NativeEncoder:
    try:
        return NativeEncoder(isa)
    except KernelError as fault:
        pytest.skip(str(fault))


def random_weight(
    rng: torch.Generator, rows: int, cols: int, block: tuple[int, int], dtype: torch.dtype, magnitude: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gaussian weights with zeros, outliers and a zero group."""
    w = (torch.randn(rows, cols, generator=rng) * 100).clamp(-448, 448)
    w *= torch.rand(rows, cols, generator=rng) > 0.1
    w[rows // 2, : min(64, cols)] = 0
    w[0, 0] = 448
    if dtype != torch.float8_e4m3fn:
        return (w * magnitude).to(dtype), None
    grid = (ceil_div(rows, block[0]), ceil_div(cols, block[1]))
    return w.to(dtype), torch.rand(grid, generator=rng) * magnitude


@needs_library
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("method", ["rtn", "ls"])
@pytest.mark.parametrize("codec", CODECS)
def test_bytes_and_errors_are_those_of_the_reference(isa: str, method: str, codec: str) -> None:
    encoder, reference = native(isa), ReferenceEncoder()
    rng = torch.Generator().manual_seed(5)
    shapes = [(1, 1), (3, 33), (160, 256), (37, 576), (300, 7), (20, 1031), (129, 128)]
    # Down to scales that fp32 and bf16 can only hold as denormals, and zero.
    magnitudes = [1e-4, 1.0, 1e30, 1e-38, 1e-43]
    for index, (rows, cols) in enumerate(shapes):
        for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float32):
            block = [(128, 128), (32, 48), (16, 16)][index % 3]
            magnitude = magnitudes[(index + int(dtype.itemsize)) % len(magnitudes)]
            weight, scale = random_weight(rng, rows, cols, block, dtype, magnitude)
            got = encoder.encode(weight, scale, block, get_codec(codec), method)
            expected = reference.encode(weight, scale, block, get_codec(codec), method)
            for suffix, tensor in expected.parts.items():
                assert torch.equal(got.parts[suffix].view(torch.uint8), tensor.view(torch.uint8)), (rows, cols, dtype)
            assert got.error == expected.error


@pytest.mark.parametrize("encoder", ["native", "reference"])
@pytest.mark.parametrize("at", [0, 40, 199])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32])
def test_numbers_that_are_none(encoder: str, at: int, dtype: torch.dtype) -> None:
    if encoder == "native" and library_path() is None:
        pytest.skip("compiled kernels not built")
    chosen, _ = select_encoder(encoder)
    weight = torch.ones(2, 100)
    weight.view(-1)[at] = torch.nan
    scale = torch.ones(1, 1) if dtype == torch.float8_e4m3fn else None
    with pytest.raises(CodecError, match="1 of 200 weights are NaN or infinite"):
        chosen.encode(weight.to(dtype), scale, (128, 128), get_codec("int4-g32"), "ls")


@needs_library
def test_a_product_that_overflows_is_refused() -> None:
    weight = torch.full((4, 64), 448.0).to(torch.float8_e4m3fn)
    scale = torch.full((1, 1), 3e38)
    for encoder in (native("portable"), ReferenceEncoder()):
        with pytest.raises(CodecError, match="infinite"):
            encoder.encode(weight, scale, (128, 128), get_codec("int4-g32"), "rtn")


def test_decoding_every_fp8_byte() -> None:
    weight = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 128)
    scale = torch.tensor([[0.1, 3.0, 1e-3, 7.0]])
    got = decode(weight, scale, (16, 33))
    expected = weight.float() * scale.repeat_interleave(33, 1)[:, :128]
    assert torch.equal(got.nan_to_num(1e9), expected.nan_to_num(1e9))


def test_choice() -> None:
    assert select_encoder("reference")[0].name == "reference"
    with pytest.raises(UsageError, match="auto, native, reference"):
        select_encoder("fast")
    encoder, note = select_encoder("auto")
    assert (encoder.name == "native") == (note is None)
