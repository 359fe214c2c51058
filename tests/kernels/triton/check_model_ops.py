"""The rest of a layer: norm, rotation, router, weighted sum, both attentions."""

from __future__ import annotations

import pytest
import torch
from on_device import DEVICE, KERNELS, REFERENCE, close, draw, same
from torch import Tensor

from offload.errors import KernelError
from offload.kernels import RouterShape


@pytest.mark.parametrize("width", [1, 1536])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_rms_norm(width: int, size: float) -> None:
    x, scale = draw(3, width) * size, draw(width, seed=1)
    wanted = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-6).sqrt() * scale.double()
    torch.testing.assert_close(KERNELS.rms_norm(x, scale, 1e-6).double(), wanted, rtol=2e-6, atol=1e-30)


def test_rope() -> None:
    x, angle = draw(4, 3, 10), draw(4, 5, seed=1)
    pairs = torch.view_as_complex(x.unflatten(2, (5, 2)).contiguous())
    wanted = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(2)
    torch.testing.assert_close(KERNELS.rope(x, angle.cos(), angle.sin()), wanted, rtol=1e-5, atol=1e-6)


ROUTERS = [
    (256, RouterShape(8, 8, 4, True, 2.5)),
    (384, RouterShape(8, 1, 1, True, 2.827)),
    (12, RouterShape(3, 1, 1, False, 1.5)),
    (6, RouterShape(6, 3, 3, True, 2.5)),
    (24, RouterShape(5, 4, 2, True, 1.0)),
]


@pytest.mark.parametrize(("experts", "shape"), ROUTERS)
@pytest.mark.parametrize("tokens", [1, 19])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_router_chooses_as_the_reference(experts: int, shape: RouterShape, tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    # Small integers: logits are exact in fp32 in any order, so that even ties agree.
    x = torch.randint(-2, 3, (tokens, 96), generator=generator).float() / 16
    weight = torch.randint(-2, 3, (experts, 96), generator=generator).float() / 4
    weight[experts // 2] = weight[0]
    bias = torch.randint(-8, 3, (experts,), generator=generator).float() / 4  # mostly negative
    bias[experts // 2] = bias[0]
    x, weight, bias = x.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE)
    ids, weights = KERNELS.router(x, weight.to(dtype), bias, shape)
    assert ids.dtype == torch.int64
    wanted_ids, wanted_weights = REFERENCE.router(x, weight.to(dtype), bias, shape)
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(weights, wanted_weights, rtol=1e-5, atol=1e-7)


def test_router_sums_long_rows_in_parts() -> None:
    x, weight, bias = draw(2, 3000), draw(16, 3000) / 50, draw(16, seed=1) / 4
    shape = RouterShape(4, 4, 2, True, 1.0)
    for part in (x[:1], x[1:], torch.cat((x, x, x))):
        ids, weights = KERNELS.router(part.contiguous(), weight, bias, shape)
        wanted = REFERENCE.router(part, weight, bias, shape)
        assert torch.equal(ids, wanted[0])
        torch.testing.assert_close(weights, wanted[1], rtol=1e-5, atol=1e-7)


def test_router_prefers_the_lower_index_and_masks_other_groups() -> None:
    shape = RouterShape(2, 4, 2, True, 1.0)
    x, weight, bias = draw(1, 16) * 0, draw(16, 16) * 0, draw(16) * 0  # every score is 0.5
    assert KERNELS.router(x, weight, bias, shape)[0].tolist() == [[0, 1]]
    bias[:8], bias[8:] = -3.0, -2.0  # the two last groups win, all their choices are negative
    assert KERNELS.router(x, weight, bias, shape)[0].tolist() == [[8, 9]]
    bias[4] = bias[5] = 9.0  # best group 1, then group 2 (ties with 3)
    assert KERNELS.router(x, weight, bias, shape)[0].tolist() == [[4, 5]]


def test_combine_adds_in_the_order_of_expert_ids() -> None:
    ids = torch.stack([torch.randperm(40)[:5] for _ in range(3)]).to(DEVICE)
    partial, weights = draw(15, 33) * torch.logspace(-4, 4, 15, device=DEVICE)[:, None], draw(3, 5)
    out = KERNELS.combine(partial, ids, weights)
    close(out, REFERENCE.combine(partial, ids, weights), 1e-6)
    shuffle = torch.tensor([2, 0, 3, 1, 4], device=DEVICE)
    moved = partial.view(3, 5, -1)[:, shuffle].flatten(0, 1).contiguous()
    again = KERNELS.combine(moved, ids[:, shuffle].contiguous(), weights[:, shuffle].contiguous())
    assert torch.equal(again, out)


def exact_attention(q: Tensor, k: Tensor, v: Tensor, start: int, scale: float) -> Tensor:
    """float64; q [T, heads, Dq], k [S, heads, Dq], v [S, heads, Dv]."""
    scores = torch.einsum("thd,shd->hts", q.double(), k.double()) * scale
    seen = torch.arange(k.shape[0])[None] <= start + torch.arange(q.shape[0])[:, None]
    masked = scores.masked_fill(~seen.to(q.device), -torch.inf)
    return torch.einsum("hts,shd->thd", masked.softmax(-1), v.double())


@pytest.mark.parametrize(
    ("tokens", "heads", "rank", "rope", "start", "dtype"),
    [
        (1, 4, 32, 16, 0, torch.bfloat16),
        (5, 3, 20, 6, 30, torch.float32),
        (2, 17, 16, 8, 511, torch.bfloat16),
        (1, 2, 48, 16, 1100, torch.float32),
    ],
)
def test_mla_absorbed(tokens: int, heads: int, rank: int, rope: int, start: int, dtype: torch.dtype) -> None:
    q_latent, q_rope = draw(tokens, heads, rank) * 2, draw(tokens, heads, rope, seed=1) * 2
    cache = draw(start + tokens + 3, rank + rope, seed=2).to(dtype)
    cache[start + tokens :] = float("nan")  # rows behind the last query must not be read
    out = KERNELS.mla_absorbed(q_latent, q_rope, cache, start, 0.11)
    rows = cache[: start + tokens].bfloat16().unsqueeze(1).expand(-1, heads, -1)
    queries = torch.cat((q_latent, q_rope), -1).bfloat16()
    close(out, exact_attention(queries, rows, rows[..., :rank], start, 0.11), 5e-3)
    at = torch.tensor([start], dtype=torch.int32, device=DEVICE)
    far = torch.full((1600, rank + rope), torch.nan, dtype=dtype, device=DEVICE)
    far[: len(cache)] = cache
    assert torch.equal(KERNELS.mla_at(q_latent, q_rope, far, at, 1600, 0.11), out)
    if tokens <= 4:
        one = KERNELS.mla_absorbed(q_latent[-1:], q_rope[-1:], cache, start + tokens - 1, 0.11)
        assert torch.equal(one, out[-1:])


def test_mla_absorbed_with_dominating_rows() -> None:
    """Scores that differ by hundreds: the largest one first, in another split, last."""
    for hot in (0, 520, 599):
        cache = draw(600, 40, seed=4)
        cache[hot] = 5.0
        q_latent, q_rope = torch.full((1, 2, 32), 3.0, device=DEVICE), torch.full((1, 2, 8), 3.0, device=DEVICE)
        out = KERNELS.mla_absorbed(q_latent, q_rope, cache, 599, 1.0)
        torch.testing.assert_close(out, torch.full_like(out, 5.0))


@pytest.mark.parametrize(
    ("tokens", "heads", "key", "value", "start"), [(1, 2, 24, 16, 0), (70, 3, 24, 16, 0), (37, 2, 40, 19, 61)]
)
def test_attend(tokens: int, heads: int, key: int, value: int, start: int) -> None:
    q = draw(tokens, heads, key) * 2
    k, v = draw(start + tokens, heads, key, seed=1), draw(start + tokens, heads, value, seed=2)
    out = KERNELS.attend(q, k, v, start, 0.2)
    close(out, exact_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), start, 0.2), 5e-3)
    t = tokens // 2
    seen = start + t + 1
    alone = KERNELS.attend(q[t : t + 1].contiguous(), k[:seen].contiguous(), v[:seen].contiguous(), seen - 1, 0.2)
    same(alone, out[t : t + 1])


def test_arguments_that_kernels_cannot_read_are_refused() -> None:
    with pytest.raises(KernelError, match=r"contiguous float32 rows of 8 values, not torch.float16"):
        KERNELS.rms_norm(draw(2, 8).half(), draw(8), 1e-6)
    with pytest.raises(KernelError, match=r"strides \(1, 8\)"):
        KERNELS.rms_norm(draw(8, 8).T, draw(8), 1e-6)
    with pytest.raises(KernelError, match=r"this call needs \(5, 40\)"):
        KERNELS.mla_absorbed(draw(2, 1, 32), draw(2, 1, 8), draw(4, 40), 3, 1.0)
