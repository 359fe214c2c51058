"""Native kernels, the rest of a layer: norm, rotation, router, both attentions, MLA absorption."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from offload.errors import KernelError
from offload.kernels import RouterShape, native_library
from offload.kernels.native import NativeKernels
from offload.kernels.reference import ReferenceKernels
from offload.quant import QuantizedTensor, get_codec

REASON = native_library.available()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"native kernels: {REASON}")
ISAS = native_library.supported_isas() if REASON is None else ()
REFERENCE = ReferenceKernels()


@pytest.fixture(params=ISAS)
def kernels(request: pytest.FixtureRequest) -> NativeKernels:
    return NativeKernels(threads=2, isa=request.param)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("hidden", [1, 7, 16, 100, 7168])
@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_rms_norm(kernels: NativeKernels, hidden: int, size: float) -> None:
    x, weight = random(5, hidden) * size, random(hidden, seed=1)
    exact = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-6).sqrt() * weight.double()
    out = kernels.rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(out.double(), exact, rtol=2e-6, atol=1e-30)
    assert torch.equal(out[3:4], kernels.rms_norm(x[3:4].contiguous(), weight, 1e-6))
    assert torch.equal(out, NativeKernels(threads=1, isa="portable").rms_norm(x, weight, 1e-6))


def test_rope_turns_interleaved_pairs(kernels: NativeKernels) -> None:
    x, angle = random(6, 3, 10), random(6, 5, seed=2)
    out = kernels.rope(x, angle.cos(), angle.sin())
    turn = torch.polar(torch.ones(6, 1, 5), angle[:, None])
    pairs = torch.view_as_complex(x.unflatten(2, (5, 2)).contiguous())
    torch.testing.assert_close(out, torch.view_as_real(pairs * turn).flatten(2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("experts", "shape"),
    [
        (256, RouterShape(8, 8, 4, True, 2.5)),
        (16, RouterShape(4, 4, 2, True, 1.0)),
        (12, RouterShape(3, 1, 1, False, 1.5)),
        (6, RouterShape(6, 3, 3, True, 2.5)),
    ],
)
def test_router_chooses_as_the_reference(kernels: NativeKernels, experts: int, shape: RouterShape) -> None:
    hidden = 96
    # Small integers: logits are exact in fp32 in any order, so that even ties agree.
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-2, 3, (50, hidden), generator=generator).float() / 16
    weight = torch.randint(-2, 3, (experts, hidden), generator=generator).float() / 4
    weight[experts // 2] = weight[0]
    weight[experts - 1] = weight[1]
    bias = torch.randint(-8, 3, (experts,), generator=generator).float() / 4  # mostly negative
    bias[experts // 2], bias[experts - 1] = bias[0], bias[1]
    ids, weights = kernels.router(x, weight, bias, shape)
    expected_ids, expected_weights = REFERENCE.router(x, weight, bias, shape)
    scores = torch.sigmoid(x @ weight.T) + bias
    for t in range(50):
        if ids[t].tolist() != expected_ids[t].tolist():  # only where sigmoids are within rounding
            assert (scores[t, ids[t]] - scores[t, expected_ids[t]]).abs().max() < 1e-6
    same = (ids == expected_ids).all(1)
    assert same.float().mean() > 0.9
    torch.testing.assert_close(weights[same], expected_weights[same], rtol=1e-5, atol=1e-7)
    alone = kernels.router(x[7:8].contiguous(), weight, bias, shape)
    assert torch.equal(alone[0], ids[7:8])
    assert torch.equal(alone[1], weights[7:8])
    for rows in (x, x[7:8].contiguous()):  # as the official checkpoint stores it, and exact here
        halved, whole = kernels.router(rows, weight.bfloat16(), bias, shape), kernels.router(rows, weight, bias, shape)
        assert torch.equal(halved[0], whole[0]) and torch.equal(halved[1], whole[1])


def test_router_prefers_the_lower_index_and_masks_other_groups(kernels: NativeKernels) -> None:
    shape = RouterShape(2, 4, 2, True, 1.0)
    x, weight = torch.zeros(1, 16), torch.zeros(16, 16)  # every score is 0.5
    assert kernels.router(x, weight, torch.zeros(16), shape)[0].tolist() == [[0, 1]]
    bias = torch.full((16,), -3.0)
    bias[8:16] = -2.0  # the two last groups win, all their choices are negative
    assert kernels.router(x, weight, bias, shape)[0].tolist() == [[8, 9]]
    bias[5] = 9.0
    bias[4] = 9.0  # best group 1, then group 2 (ties with 3)
    assert kernels.router(x, weight, bias, shape)[0].tolist() == [[4, 5]]


def exact_attention(q: Tensor, k: Tensor, v: Tensor, start: int, scale: float) -> Tensor:
    """float64; q [T, heads, Dq], k [S, heads, Dq], v [S, heads, Dv]."""
    scores = torch.einsum("thd,shd->hts", q.double(), k.double()) * scale
    seen = torch.arange(k.shape[0])[None] <= start + torch.arange(q.shape[0])[:, None]
    return torch.einsum("hts,shd->thd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "heads", "latent", "rope", "start"),
    [(1, 4, 32, 16, 0), (5, 3, 20, 6, 30), (3, 35, 64, 8, 100), (2, 5, 32, 16, 1022), (1, 2, 48, 16, 2100)],
)
def test_mla_absorbed(
    kernels: NativeKernels, dtype: torch.dtype, tokens: int, heads: int, latent: int, rope: int, start: int
) -> None:
    q_latent, q_rope = random(tokens, heads, latent) * 2, random(tokens, heads, rope, seed=1) * 2
    cache = random(start + tokens + 3, latent + rope, seed=2).to(dtype)
    cache[start + tokens :] = float("nan")  # rows behind the last query must not be read
    out = kernels.mla_absorbed(q_latent, q_rope, cache, start, 0.11)
    rows = cache[: start + tokens].float().unsqueeze(1).expand(-1, heads, -1)
    exact = exact_attention(torch.cat((q_latent, q_rope), -1), rows, rows[..., :latent], start, 0.11)
    torch.testing.assert_close(out.double(), exact, rtol=2e-5, atol=2e-6)
    for t in range(tokens):
        part = q_latent[t : t + 1].contiguous(), q_rope[t : t + 1].contiguous()
        assert torch.equal(kernels.mla_absorbed(*part, cache, start + t, 0.11), out[t : t + 1])
    for threads in (1, 3):
        again = NativeKernels(threads=threads, isa="portable").mla_absorbed(q_latent, q_rope, cache, start, 0.11)
        assert torch.equal(again, out), f"portable on {threads} threads gives other bits"


def test_mla_absorbed_with_dominating_rows(kernels: NativeKernels) -> None:
    """Scores that differ by hundreds, the largest one first, in the middle and last."""
    for hot in (0, 40, 1500, 1999):
        cache = random(2000, 40, seed=4)
        cache[hot] = 5.0
        q_latent, q_rope = torch.full((1, 2, 32), 3.0), torch.full((1, 2, 8), 3.0)
        out = kernels.mla_absorbed(q_latent, q_rope, cache, 1999, 1.0)
        torch.testing.assert_close(out, torch.full_like(out, 5.0))


@pytest.mark.parametrize(
    ("tokens", "heads", "key", "value", "start"),
    [(1, 2, 24, 16, 0), (70, 3, 24, 16, 0), (37, 2, 40, 19, 61), (3, 2, 192, 128, 9)],
)
def test_attend(kernels: NativeKernels, tokens: int, heads: int, key: int, value: int, start: int) -> None:
    q = random(tokens, heads, key) * 2
    k, v = random(start + tokens, heads, key, seed=1), random(start + tokens, heads, value, seed=2)
    out = kernels.attend(q, k, v, start, 0.2)
    torch.testing.assert_close(out.double(), exact_attention(q, k, v, start, 0.2), rtol=2e-5, atol=2e-6)
    t = tokens // 2
    seen = start + t + 1
    alone = kernels.attend(q[t : t + 1].contiguous(), k[:seen].contiguous(), v[:seen].contiguous(), seen - 1, 0.2)
    assert torch.equal(alone, out[t : t + 1])
    assert torch.equal(NativeKernels(threads=1, isa="portable").attend(q, k, v, start, 0.2), out)


@pytest.mark.parametrize("codec", ["int8-g128", "int4-g32", "bf16", "fp8"])
@pytest.mark.parametrize(("heads", "nope", "value", "latent"), [(3, 16, 24, 64), (2, 5, 7, 50)])
def test_absorption(kernels: NativeKernels, codec: str, heads: int, nope: int, value: int, latent: int) -> None:
    c = get_codec(codec)
    rows = heads * (nope + value)
    kv_b = QuantizedTensor(c, rows, latent, c.encode(random(rows, latent) * 0.1))
    w = kv_b.dequantize(torch.float32).double().unflatten(0, (heads, nope + value))
    for tokens in (1, 6):
        q, u = random(tokens, heads, nope, seed=1), random(tokens, heads, latent, seed=2)
        query = kernels.absorb_query(q, kv_b)
        exact = torch.einsum("thn,hnr->thr", q.double(), w[:, :nope])
        torch.testing.assert_close(query.double(), exact, rtol=1e-5, atol=1e-5)
        out = kernels.expand_value(u, kv_b, value)
        exact = torch.einsum("thr,hvr->thv", u.double(), w[:, nope:])
        # Integer formats round u to 1/127 of the largest value of its group.
        room = u.abs().amax(2, keepdim=True).double() / 254 * w[:, nope:].abs().sum(2) if codec[:3] == "int" else 0
        assert ((out.double() - exact).abs() <= room + 1e-5).all()
        portable = NativeKernels(threads=3, isa="portable")
        assert torch.equal(portable.absorb_query(q, kv_b), query)
        assert torch.equal(portable.expand_value(u, kv_b, value), out)
        last = u[-1:].contiguous(), q[-1:].contiguous()
        assert torch.equal(kernels.expand_value(last[0], kv_b, value), out[-1:])
        assert torch.equal(kernels.absorb_query(last[1], kv_b), query[-1:])


def test_queries_that_are_not_finite_are_refused(kernels: NativeKernels) -> None:
    c = get_codec("bf16")
    kv_b = QuantizedTensor(c, 2 * 12, 32, c.encode(random(24, 32)))
    cache, shape = random(10, 40), RouterShape(2, 1, 1, True, 1.0)
    for bad in (float("nan"), float("inf")):
        q, rope, u = random(3, 2, 4), random(3, 2, 8), random(3, 2, 32)
        x = random(3, 16)
        q[2, 1, 3] = rope[2, 0, 0] = u[2, 1, 31] = x[2, 5] = bad
        calls = (
            lambda q=q: kernels.absorb_query(q, kv_b),
            lambda u=u: kernels.expand_value(u, kv_b, 8),
            lambda u=u: kernels.mla_absorbed(u, random(3, 2, 8), cache, 0, 1.0),
            lambda rope=rope: kernels.mla_absorbed(random(3, 2, 32), rope, cache, 0, 1.0),
            lambda q=q: kernels.attend(q, random(3, 2, 4), random(3, 2, 4), 0, 1.0),
            lambda x=x: kernels.router(x, random(4, 16), random(4), shape),
        )
        for call in calls:
            with pytest.raises(KernelError, match="row 2 hold"):
                call()


def test_a_cache_that_is_too_small_is_refused(kernels: NativeKernels) -> None:
    with pytest.raises(KernelError, match="needs"):
        kernels.mla_absorbed(random(2, 1, 16), random(2, 1, 16), random(4, 32), 3, 1.0)
