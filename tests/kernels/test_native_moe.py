"""The fused MoE block: the bits of the single kernels in turn, however calls interleave."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from offload.errors import KernelError
from offload.kernels import Kernels, MoeLayer, RouterShape, native_library
from offload.kernels.native import NativeKernels
from offload.quant import QuantizedTensor, get_codec

REASON = native_library.available()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"native kernels: {REASON}")
ISAS = native_library.supported_isas() if REASON is None else ()

HIDDEN, INNER, EXPERTS, TOP = 96, 40, 8, 3


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight(codec: str, rows: int, cols: int, seed: int) -> QuantizedTensor:
    found = get_codec(codec)
    return QuantizedTensor(found, rows, cols, found.encode(random(rows, cols, seed=seed) / cols**0.5))


@dataclass(frozen=True)
class Matrices:
    """An expert whose matrices lie anywhere."""

    gate_proj: QuantizedTensor
    up_proj: QuantizedTensor
    down_proj: QuantizedTensor
    buffer: Tensor


def expert(codec: str, seed: int) -> Matrices:
    return Matrices(
        weight(codec, INNER, HIDDEN, seed),
        weight(codec, INNER, HIDDEN, seed + 1),
        weight(codec, HIDDEN, INNER, seed + 2),
        torch.empty(0, dtype=torch.uint8),
    )


def make_layer(codec: str | None) -> MoeLayer:
    shared = expert(codec, 50) if codec else None
    return MoeLayer(
        norm=random(HIDDEN, seed=1).abs(),
        eps=1e-6,
        router=random(EXPERTS, HIDDEN, seed=2),
        bias=random(EXPERTS, seed=3),
        shape=RouterShape(TOP, 4, 2, True, 2.5),
        shared=None if shared is None else (shared.gate_proj, shared.up_proj, shared.down_proj),
    )


def routed(kernels: Kernels, experts: list[Matrices], x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    partial = torch.zeros(ids.numel(), HIDDEN)
    flat = ids.flatten()
    wave = [(experts[e], (flat == e).nonzero().flatten()) for e in flat.unique().tolist()]
    kernels.experts(x, wave, TOP, partial)
    return kernels.combine(partial, ids, weights)


def composed(kernels: Kernels, layer: MoeLayer, experts: list[Matrices], hidden: Tensor) -> Tensor:
    x = kernels.rms_norm(hidden, layer.norm, layer.eps)
    ids, weights = kernels.router(x, layer.router, layer.bias, layer.shape)
    out = routed(kernels, experts, x, ids, weights)
    return hidden + (out if layer.shared is None else out + kernels.swiglu_mlp(x, *layer.shared))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shared", ["int4-g32", "bf16", None])
def test_bits_of_the_single_kernels(isa: str, shared: str | None) -> None:
    layer, experts = make_layer(shared), [expert("int4-g32", 100 + 3 * e) for e in range(EXPERTS)]
    for tokens in (1, 2, 6):
        hidden = random(tokens, HIDDEN, seed=tokens)
        expected = composed(NativeKernels(threads=1, isa=isa), layer, experts, hidden)
        for threads in (1, 2, 3):
            kernels = NativeKernels(threads=threads, isa=isa)
            for _ in range(20):  # the workers begin at different moments
                start = kernels.begin_moe(layer, hidden)
                out = routed(kernels, experts, start.x, start.ids, start.weights)
                assert torch.equal(kernels.end_moe(layer, hidden, start, out), expected)


def test_other_calls_may_come_between() -> None:
    kernels, layer = NativeKernels(threads=2), make_layer("int4-g32")
    first, second, nothing = random(1, HIDDEN, seed=20), random(3, HIDDEN, seed=21), torch.zeros(3, HIDDEN)
    expected = [kernels.end_moe(layer, x, kernels.begin_moe(layer, x), nothing[: len(x)]) for x in (first, second)]
    assert not torch.equal(expected[0][0], expected[1][0])
    a = kernels.begin_moe(layer, first)
    kernels.rms_norm(second, layer.norm, 1e-6)
    b = kernels.begin_moe(layer, second)
    assert torch.equal(kernels.end_moe(layer, first, a, nothing[:1]), expected[0])
    assert torch.equal(kernels.end_moe(layer, second, b, nothing), expected[1])
    kernels.begin_moe(layer, first)  # never ended
    other = weight("bf16", 8, HIDDEN, 5)
    torch.testing.assert_close(kernels.linear(first, other), first @ other.dequantize().float().T, rtol=1e-5, atol=1e-5)


def test_refuses_bad_activations() -> None:
    kernels, layer = NativeKernels(threads=2), make_layer("int4-g32")
    hidden = random(2, HIDDEN, seed=30)
    hidden[1, 3] = torch.nan
    with pytest.raises(KernelError, match="row 1 hold NaN"):
        kernels.begin_moe(layer, hidden)
    start = kernels.begin_moe(layer, hidden[:1].contiguous())
    with pytest.raises(KernelError, match="expected 1 rows"):
        kernels.end_moe(layer, hidden[:1].contiguous(), start, torch.zeros(2, HIDDEN))
