"""Codecs: exact layouts, bounds on the error, ragged edges, refusals, agreement with compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32

from offload.errors import CodecError
from offload.quant import codec_names, get_codec
from offload.quant.metrics import error_stats

ALL = (*codec_names(), "fp8-b32x32")
SHAPES = ((1, 1), (3, 31), (64, 96), (130, 257), (576, 160))


def random_weight(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    return weight * torch.rand(rows, 1, generator=generator).mul(6).sub(5).exp()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", SHAPES)
def test_parts_describe_exactly_what_encode_returns(name: str, shape: tuple[int, int]) -> None:
    codec = get_codec(name)
    parts = codec.encode(random_weight(*shape))
    specs = codec.parts(*shape)
    assert list(parts) == [spec.suffix for spec in specs]
    for spec in specs:
        tensor = parts[spec.suffix]
        assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape)
        assert tensor.nbytes == spec.nbytes
    assert codec.nbytes(*shape) == sum(part.nbytes for part in parts.values())


# Largest error of an element: half a step, where the step is the scale. The scale itself is rounded to
# bf16 (2^-9), and rtn lets the extreme element lose up to one more half step.
BOUND = {
    "bf16": 2**-8,
    "fp8": 2**-4,
    "fp8-b32x32": 2**-4,
    "int8-g128": 1.1 / 127,
    "int4-g32": 1.1 / 7.5,
    "int4-g128": 1.1 / 7.5,
    "int3-g32": 1.1 / 3.5,
    "int2-g32": 1.1 / 1.5,
}
NF4_GAP = 0.1520  # half the widest gap between neighbours of its table


@pytest.mark.parametrize("method", ["rtn", "ls"])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_element_is_within_the_bound_of_its_format(name: str, shape: tuple[int, int], method: str) -> None:
    codec = get_codec(name)
    weight = random_weight(*shape)
    decoded = codec.decode(codec.encode(weight, method), *shape, torch.float32)
    if name.startswith("nf4"):
        flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
        amax = flat.abs().amax(1).repeat_interleave(64)[: weight.numel()].view(shape)
        assert ((decoded - weight).abs() <= amax * NF4_GAP).all()
    elif name.startswith("int"):
        amax = torch.nn.functional.pad(weight, (0, -shape[1] % codec.group))
        amax = amax.view(shape[0], -1, codec.group).abs().amax(2).repeat_interleave(codec.group, 1)[:, : shape[1]]
        slack = 1.0 if method == "rtn" else 3.0  # ls trades the extreme element for the rest
        assert ((decoded - weight).abs() <= amax * BOUND[name] * slack).all()
    else:
        floor = weight.abs().amax() * 2**-16 if name.startswith("fp8") else 0.0
        assert ((decoded - weight).abs() <= weight.abs() * BOUND[name] + floor).all()


@pytest.mark.parametrize("name", ["int4-g32", "int4-g128", "int8-g128", "int3-g32", "int2-g32"])
def test_least_squares_scales_beat_plain_rounding(name: str) -> None:
    codec = get_codec(name)
    weight = random_weight(64, 512)
    rtn, ls = (
        error_stats(weight, codec.decode(codec.encode(weight, m), 64, 512, torch.float32)).relative_rmse
        for m in ("rtn", "ls")
    )
    assert ls < rtn


def test_importance_moves_the_error_to_the_columns_that_matter_less() -> None:
    codec = get_codec("int4-g32")
    weight = random_weight(64, 128)
    importance = torch.ones(128)
    importance[::4] = 100.0
    plain, weighted = (
        codec.decode(codec.encode(weight, "ls", h), 64, 128, torch.float32) - weight for h in (None, importance)
    )
    assert (weighted[:, ::4].square().sum()) < 0.9 * plain[:, ::4].square().sum()


@pytest.mark.parametrize("name", ALL)
def test_zero_and_tiny_weights_survive(name: str) -> None:
    codec = get_codec(name)
    for weight in (torch.zeros(4, 64), torch.full((4, 64), 1e-42), torch.full((4, 64), 1e30)):
        decoded = codec.decode(codec.encode(weight, "ls"), 4, 64, torch.float32)
        assert torch.isfinite(decoded).all()
        # Squares of 1e30 overflow: the search keeps the plain scale, whose extreme element loses half a step.
        loss = 0.34 if name == "int2-g32" else 0.15
        assert (decoded - weight).abs().max() <= weight.abs().max() * loss + 1e-38
    assert not codec.decode(codec.encode(torch.zeros(4, 64)), 4, 64).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ALL)
def test_non_finite_weights_are_refused_with_their_number(name: str, bad: float) -> None:
    weight = random_weight(4, 64)
    weight[1, 3] = weight[2, 5] = bad
    with pytest.raises(CodecError, match="2 of 256"):
        get_codec(name).encode(weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("cols", [1, 10, 11, 31, 32, 43, 257])
def test_packing_is_the_packing_of_compressed_tensors(bits: int, cols: int) -> None:
    codec = get_codec(f"int{bits}-g32")
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (7, cols), dtype=torch.int8)
    packed = codec.pack(codes)
    # Bits beyond the last column are ours to choose; what counts is that each reads the other.
    assert torch.equal(unpack_from_int32(packed, bits, torch.Size((7, cols))), codes)
    assert torch.equal(codec.unpack(pack_to_int32(codes, bits), cols), codes)


def test_fp8_uses_ceil_grids_and_the_block_size_of_its_name() -> None:
    codec = get_codec("fp8")
    scale = torch.rand(5, 2) + 0.5
    weight = torch.ones(576, 160).to(torch.float8_e4m3fn)
    decoded = codec.decode({"weight": weight, "weight_scale": scale}, 576, 160, torch.float32)
    assert decoded[575, 159] == scale[4, 1] and decoded[511, 127] == scale[3, 0]
    assert get_codec("fp8-b32x32").grid(33, 32) == (2, 1)


@pytest.mark.parametrize("name", ["int5-g32", "int4-g33", "fp9", "", "int4"])
def test_an_unknown_codec_is_refused_by_name(name: str) -> None:
    with pytest.raises(CodecError, match="known codecs: bf16, fp8"):
        get_codec(name)
