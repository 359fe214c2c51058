"""Every codec on weights of any size and any magnitude: bounds, agreement with compressed-tensors and bitsandbytes."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from offload.quant import codec_names, get_codec
from offload.quant.grouped import GroupedIntCodec
from offload.quant.nf4 import Nf4Codec

INTS = [name for name in codec_names() if name.startswith("int")] + ["int3-g64", "int2-g128", "int8-g32"]
KINDS = ("plain", "zero groups", "outliers", "denormal", "tiny", "huge", "constant", "one element")


def weights(kind: str, rows: int, cols: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    if kind == "zero groups":
        weight[:, : cols // 2] = 0.0
        weight[rows // 2] = 0.0
    elif kind == "outliers":
        weight[seed % rows, seed % cols] *= 1e4
    elif kind in ("denormal", "tiny", "huge"):
        weight *= {"denormal": 1e-42, "tiny": 1e-36, "huge": 1e36}[kind]
    elif kind == "constant":
        weight[:] = -0.75
    elif kind == "one element":
        weight[:] = 0.0
        weight[seed % rows, seed % cols] = 3.0
    return weight


any_weight = st.tuples(st.sampled_from(KINDS), st.integers(1, 40), st.integers(1, 300), st.integers(0, 2**20))


def spread(weight: Tensor, group: int) -> Tensor:
    """The largest magnitude of every element's group."""
    rows, cols = weight.shape
    groups = pad(weight, (0, -cols % group)).view(rows, -1, group)
    return groups.abs().amax(2).repeat_interleave(group, 1)[:, :cols]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(INTS), st.sampled_from(["rtn", "ls"]), any_weight)
def test_ints(name: str, method: str, drawn: tuple[str, int, int, int]) -> None:
    codec = get_codec(name)
    assert isinstance(codec, GroupedIntCodec)
    weight = weights(*drawn)
    rows, cols = weight.shape
    parts = codec.encode(weight, method)
    for spec in codec.parts(rows, cols):
        assert (parts[spec.suffix].dtype, tuple(parts[spec.suffix].shape)) == (spec.dtype, spec.shape)
    decoded = codec.decode(parts, rows, cols, torch.float32)
    assert torch.isfinite(decoded).all()
    amax = spread(weight, codec.group)
    # Half a step, or what the extreme code lacks. A group whose scale has no finite reciprocal counts as zero.
    step = 1.1 / (codec.qmax + 0.5) * (1.0 if method == "rtn" else 3.0)
    assert ((decoded - weight).abs() <= amax * step + (codec.qmax + 1) * 2.0**-127).all()
    assert not decoded[amax == 0].any()
    assert torch.equal(codec.pack(codec.unpack(parts["weight_packed"], cols)), parts["weight_packed"])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(INTS), any_weight)
def test_compressed_tensors_decodes_the_same_weights(name: str, drawn: tuple[str, int, int, int]) -> None:
    codec = get_codec(name)
    assert isinstance(codec, GroupedIntCodec)
    kind, rows, cols, seed = drawn
    cols = -(-cols // codec.group) * codec.group  # it wants whole groups
    weight = weights(kind, rows, cols, seed)
    parts = codec.encode(weight, "ls") | codec.companions(rows, cols)
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights={"num_bits": codec.bits, "type": "int", "strategy": "group", "group_size": codec.group},
    )
    decoded = BaseCompressor.get_value_from_registry("pack-quantized").decompress(dict(parts), scheme)["weight"]
    assert torch.equal(decoded, codec.decode(parts, rows, cols, decoded.dtype))


@settings(max_examples=60, deadline=None)
@given(any_weight)
def test_nf4_is_what_bitsandbytes_makes_and_reads(drawn: tuple[str, int, int, int]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    codec = get_codec("nf4-b64")
    assert isinstance(codec, Nf4Codec)
    weight = weights(*drawn)
    rows, cols = weight.shape
    parts = codec.encode(weight)
    named = {"weight.absmax": parts["weight.absmax"], **codec.companions(rows, cols)}
    statistics = {name.removeprefix("weight."): tensor for name, tensor in named.items()}
    state = functional.QuantState.from_dict(statistics, device=torch.device("cpu"))
    for dtype in (torch.bfloat16, torch.float32):
        state.dtype = dtype
        state.shape = torch.Size([rows * cols])  # its AVX-512 code takes blocks to begin anew with every row
        theirs = functional.dequantize_4bit(parts["weight"], state).reshape(rows, cols)
        assert torch.equal(theirs, codec.decode(parts, rows, cols, dtype))
    assert torch.isfinite(theirs).all()
    flat = pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    amax = flat.abs().amax(1).repeat_interleave(64)[: weight.numel()].view(rows, cols)
    assert ((theirs - weight).abs() <= amax * 0.1520 + 1e-38).all()


@pytest.mark.parametrize("name", codec_names())
def test_rows_can_be_decoded_alone_and_strips_joined(name: str) -> None:
    codec = get_codec(name)
    for rows, cols in ((300, 96), (257, 130)):
        weight = weights("plain", rows, cols, rows)
        parts = codec.encode(weight)
        whole = codec.decode(parts, rows, cols)
        ids = torch.tensor([rows - 1, 0, 17, 17, 128])
        assert torch.equal(codec.rows_of(parts, rows, cols, ids), whole[ids])
        strips = [codec.encode(strip) for strip in weight.split(codec.row_unit * 2 if codec.row_unit > 1 else 70)]
        for suffix, part in parts.items():
            joined = torch.cat([strip[suffix].view(torch.uint8) for strip in strips])
            assert torch.equal(joined, part.view(torch.uint8))
        companions = codec.companions(rows, cols)
        assert codec.shape_of(tuple(next(iter(parts.values())).shape), companions.__getitem__) == (rows, cols)
