"""The fused attention block: the bits of the single kernels in turn, whatever the threads and the context."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from offload.errors import KernelError
from offload.kernels import AttentionLayer, FusedKernels, Kernels, native_library
from offload.kernels.native import NativeKernels
from offload.kernels.reference import ReferenceKernels
from offload.quant import QuantizedTensor, get_codec

REASON = native_library.available()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"native kernels: {REASON}")
ISAS = native_library.supported_isas() if REASON is None else ()

HIDDEN, LOW, LATENT, ROPE, NOPE, VALUE, HEADS = 96, 48, 64, 16, 24, 40, 6


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight(codec: str, rows: int, cols: int, seed: int) -> QuantizedTensor:
    parts = get_codec(codec).encode(random(rows, cols, seed=seed) / cols**0.5)
    return QuantizedTensor(get_codec(codec), rows, cols, parts)


def make_layer(codec: str, kv_codec: str, low_rank: bool, seed: int = 0) -> AttentionLayer:
    query = HEADS * (NOPE + ROPE)
    return AttentionLayer(
        input_norm=random(HIDDEN, seed=seed + 1).abs(),
        q_a=weight(codec, LOW, HIDDEN, seed + 2) if low_rank else None,
        q_a_norm=random(LOW, seed=seed + 3).abs() if low_rank else None,
        q_b=weight(codec, query, LOW if low_rank else HIDDEN, seed + 4),
        kv_a=weight(kv_codec, LATENT + ROPE, HIDDEN, seed + 5),
        kv_a_norm=random(LATENT, seed=seed + 6).abs(),
        kv_b=weight(kv_codec, HEADS * (NOPE + VALUE), LATENT, seed + 7),
        o=weight(codec, HIDDEN, HEADS * VALUE, seed + 8),
        eps=1e-6,
        latent_eps=1e-6,
        scale=0.17,
        num_attention_heads=HEADS,
        qk_nope_head_dim=NOPE,
        qk_rope_head_dim=ROPE,
        v_head_dim=VALUE,
    )


def composed(
    kernels: Kernels, layer: AttentionLayer, hidden: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, start: int
) -> Tensor:
    """The block from single kernels."""
    tokens = len(hidden)
    x = kernels.rms_norm(hidden, layer.input_norm, layer.eps)
    low = x
    if layer.q_a is not None and layer.q_a_norm is not None:
        low = kernels.rms_norm(kernels.linear(x, layer.q_a), layer.q_a_norm, layer.latent_eps)
    q_nope, q_rope = kernels.linear(low, layer.q_b).view(tokens, HEADS, -1).split((NOPE, ROPE), -1)
    latent, key = kernels.linear(x, layer.kv_a).split((LATENT, ROPE), -1)
    cache[start : start + tokens, :LATENT] = kernels.rms_norm(latent.contiguous(), layer.kv_a_norm, layer.latent_eps)
    cache[start : start + tokens, LATENT:] = kernels.rope(key.unsqueeze(1).contiguous(), cos, sin).squeeze(1)
    q_latent = kernels.absorb_query(q_nope.contiguous(), layer.kv_b)
    q_rope = kernels.rope(q_rope.contiguous(), cos, sin)
    mixed = kernels.mla_absorbed(q_latent, q_rope, cache, start, layer.scale)
    heads = kernels.expand_value(mixed, layer.kv_b, VALUE)
    return hidden + kernels.linear(heads.flatten(1), layer.o)


def inputs(tokens: int, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    angle = random(tokens, ROPE // 2, seed=9)
    return random(tokens, HIDDEN, seed=10), angle.cos(), angle.sin(), random(start + tokens + 2, LATENT + ROPE, seed=11)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("low_rank", [True, False])
@pytest.mark.parametrize(("codec", "kv_codec"), [("int4-g32", "int4-g32"), ("int8-g128", "bf16"), ("fp8", "fp8")])
def test_bits_of_the_single_kernels(isa: str, low_rank: bool, codec: str, kv_codec: str) -> None:
    layer = make_layer(codec, kv_codec, low_rank)
    for tokens, start in [(1, 0), (1, 700), (1, 1023), (1, 1024), (3, 1022), (7, 0)]:
        hidden, cos, sin, cache = inputs(tokens, start)
        expected_cache = cache.clone()
        single = NativeKernels(threads=1, isa=isa)
        expected = composed(single, layer, hidden, cos, sin, expected_cache, start)
        assert isinstance(single, FusedKernels)
        for threads in (1, 3):
            rows = cache.clone()
            out = NativeKernels(threads=threads, isa=isa).attention(layer, hidden, cos, sin, rows, start)
            assert torch.equal(out, expected), (tokens, start, threads)
            assert torch.equal(rows, expected_cache)


def test_close_to_the_reference() -> None:
    layer = make_layer("bf16", "bf16", True)  # formats that leave the activations in fp32
    for tokens, start in [(1, 300), (4, 1030)]:
        hidden, cos, sin, cache = inputs(tokens, start)
        expected = composed(ReferenceKernels(), layer, hidden, cos, sin, cache.clone(), start)
        out = NativeKernels(threads=2).attention(layer, hidden, cos, sin, cache.clone(), start)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_refuses_what_does_not_fit() -> None:
    kernels, layer = NativeKernels(threads=2), make_layer("int4-g32", "int4-g32", True)
    hidden, cos, sin, cache = inputs(2, 5)
    with pytest.raises(KernelError, match="has 9 rows, this call needs 10"):
        kernels.attention(layer, hidden, cos, sin, cache, 8)
    broken = hidden.clone()
    broken[1, 7] = torch.nan
    with pytest.raises(KernelError, match="row 1 hold NaN"):
        kernels.attention(layer, broken, cos, sin, cache, 5)
    with pytest.raises(KernelError, match="o of an attention layer"):
        kernels.attention(dataclasses.replace(layer, o=layer.q_b), hidden, cos, sin, cache, 5)
    broken_cache = cache.clone()
    poisoned = dataclasses.replace(layer, kv_a_norm=torch.full((LATENT,), torch.inf))
    with pytest.raises(KernelError, match="row 0 hold NaN"):
        kernels.attention(poisoned, hidden, cos, sin, broken_cache, 5)
