"""The reference kernels against independent formulations, and what every backend promises."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from offload.kernels import RouterShape, select
from offload.kernels.reference import KEYS, ROWS
from offload.quant import QuantizedTensor, get_codec

CODECS = ("bf16", "fp8", "fp8-b32x32", "int8-g128", "int4-g32")
KERNELS = select("reference")


@dataclass(frozen=True)
class _Expert:
    gate_proj: QuantizedTensor
    up_proj: QuantizedTensor
    down_proj: QuantizedTensor
    buffer: Tensor


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _weight(rows: int, cols: int, codec: str = "bf16", seed: int = 0) -> QuantizedTensor:
    c = get_codec(codec)
    return QuantizedTensor(c, rows, cols, c.encode(_draw(rows, cols, seed=seed) / cols**0.5))


def _expert(hidden: int, width: int, codec: str = "bf16", seed: int = 0) -> _Expert:
    sizes = ((width, hidden), (width, hidden), (hidden, width))
    return _Expert(*(_weight(*s, codec, seed + i) for i, s in enumerate(sizes)), torch.empty(0, dtype=torch.uint8))


def _close(got: Tensor, wanted: Tensor, tolerance: float = 2e-6) -> None:
    assert got.dtype == torch.float32
    assert got.shape == wanted.shape
    error = (got.double() - wanted.double()).abs().max() / wanted.abs().max()
    assert error <= tolerance, f"relative to the largest value: {error:.2e}"


# -- meaning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("rows", "cols"), [(64, 128), (37, 77), (576, 130), (1, 5)])
def test_linear(codec: str, rows: int, cols: int) -> None:
    weight, x = _weight(rows, cols, codec), _draw(21, cols, seed=1)
    _close(KERNELS.linear(x, weight), x.double() @ weight.dequantize().double().T)


def test_linear_uses_weights_as_other_engines_round_them() -> None:
    weight, x = _weight(64, 256, "fp8"), _draw(4, 256, seed=1)
    unrounded = x.double() @ weight.dequantize(torch.float32).double().T
    assert (KERNELS.linear(x, weight).double() - unrounded).abs().max() > 1e-4


def test_rms_norm() -> None:
    x, weight = _draw(9, 33) * 1e-3, _draw(33, seed=1)
    wanted = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-5).sqrt() * weight.double()
    _close(KERNELS.rms_norm(x, weight, 1e-5), wanted)


@pytest.mark.parametrize("codec", CODECS)
def test_swiglu(codec: str) -> None:
    expert, x = _expert(40, 56, codec), _draw(5, 40, seed=3)
    _close(KERNELS.swiglu_mlp(x, expert.gate_proj, expert.up_proj, expert.down_proj), _swiglu(expert, x))


def _swiglu(expert: _Expert, x: Tensor) -> Tensor:
    gate, up, down = (w.dequantize().double() for w in (expert.gate_proj, expert.up_proj, expert.down_proj))
    z = x.double() @ gate.T
    return (z / (1 + (-z).exp()) * (x.double() @ up.T)) @ down.T


def test_rope_turns_interleaved_pairs() -> None:
    x, angles = _draw(6, 3, 10), _draw(6, 5, seed=1)
    pairs = torch.view_as_complex(x.double().unflatten(2, (5, 2)))
    turned = pairs * torch.polar(torch.ones_like(angles).double(), angles.double()).unsqueeze(1)
    _close(KERNELS.rope(x, angles.cos(), angles.sin()), torch.view_as_real(turned).flatten(2))


def test_kv_b_holds_keys_then_values_of_each_head() -> None:
    heads, nope, v, rank = 3, 5, 4, 20
    kv_b = _weight(heads * (nope + v), rank)
    dense = kv_b.dequantize().double()
    q, u = _draw(7, heads, nope, seed=1), _draw(7, heads, rank, seed=2)
    for h in range(heads):
        first = h * (nope + v)
        _close(KERNELS.absorb_query(q, kv_b)[:, h], q[:, h].double() @ dense[first : first + nope])
        _close(KERNELS.expand_value(u, kv_b, v)[:, h], u[:, h].double() @ dense[first + nope : first + nope + v].T)


@pytest.mark.parametrize("start", [0, 1, KEYS - 1, KEYS, 2 * KEYS + 3])
@pytest.mark.parametrize("tokens", [1, ROWS + 3])
def test_attention_is_causal_softmax(start: int, tokens: int) -> None:
    heads, rank, d, scale, total = 3, 20, 6, 0.4, start + tokens
    q, q_rope = _draw(tokens, heads, rank), _draw(tokens, heads, d, seed=1)
    cache = _draw(total + 5, rank + d, seed=2)
    cache[total:] = torch.nan  # not written yet: must not be looked at
    keys = cache[:total].unsqueeze(1).expand(-1, heads, -1)
    wanted = _attention(torch.cat((q, q_rope), 2), keys, keys[..., :rank], start, scale)
    _close(KERNELS.mla_absorbed(q, q_rope, cache, start, scale), wanted, 1e-5)
    q, k, v = _draw(tokens, heads, 9, seed=5), _draw(total, heads, 9, seed=3), _draw(total, heads, 7, seed=4)
    _close(KERNELS.attend(q, k, v, start, scale), _attention(q, k, v, start, scale), 1e-5)


def _attention(q: Tensor, k: Tensor, v: Tensor, start: int, scale: float) -> Tensor:
    out = []
    for t in range(q.shape[0]):
        seen = start + t + 1
        scores = torch.einsum("hd,shd->hs", q[t].double(), k[:seen].double()) * scale
        out.append(torch.einsum("hs,shd->hd", scores.softmax(-1), v[:seen].double()))
    return torch.stack(out)


def test_attention_survives_large_scores() -> None:
    q, k, v = 300 * _draw(3, 2, 8), _draw(3, 2, 8, seed=1), _draw(3, 2, 4, seed=2)
    _close(KERNELS.attend(q, k, v, 0, 1.0), _attention(q, k, v, 0, 1.0), 1e-4)


def test_mla_reads_a_bf16_cache() -> None:
    q, q_rope, cache = _draw(2, 3, 20), _draw(2, 3, 6, seed=1), _draw(9, 26, seed=2).to(torch.bfloat16)
    same = KERNELS.mla_absorbed(q, q_rope, cache.float(), 5, 0.3)
    assert torch.equal(KERNELS.mla_absorbed(q, q_rope, cache, 5, 0.3), same)


# -- experts -------------------------------------------------------------------------------------


def test_experts_write_their_positions_and_nothing_else() -> None:
    k, x = 3, _draw(5, 40)
    first, second = _expert(40, 24, "int4-g32"), _expert(40, 24, "int4-g32", seed=7)
    partial = torch.full((15, 40), torch.nan)
    nobody = torch.tensor([], dtype=torch.int64)
    KERNELS.experts(x, [(first, torch.tensor([0, 4, 14])), (second, torch.tensor([7])), (first, nobody)], k, partial)
    _close(partial[[0, 4, 14]], _swiglu(first, x[[0, 1, 4]]))
    _close(partial[[7]], _swiglu(second, x[[2]]))
    assert partial.isnan().any(1).nonzero().flatten().tolist() == [1, 2, 3, 5, 6, 8, 9, 10, 11, 12, 13]


def test_combine_adds_in_the_order_of_expert_ids() -> None:
    ids = torch.tensor([[9, 2, 4, 30], [3, 1, 0, 2]])
    partial, weights = _draw(8, 33) * torch.logspace(-4, 4, 8).unsqueeze(1), _draw(2, 4, seed=1)
    got = KERNELS.combine(partial, ids, weights)
    for t, order in enumerate([[1, 2, 0, 3], [2, 1, 3, 0]]):
        total = torch.zeros(33)
        for j in order:
            total = total + partial[4 * t + j] * weights[t, j]
        assert torch.equal(got[t], total)
    shuffle = torch.tensor([2, 0, 3, 1])
    moved = partial.view(2, 4, -1)[:, shuffle].flatten(0, 1)
    assert torch.equal(KERNELS.combine(moved, ids[:, shuffle], weights[:, shuffle]), got)


# -- a row's bits depend on that row alone -------------------------------------------------------

SIZES = [(7, 5), (64, 128), (37, 77), (160, 96), (129, 200), (24, 57)]
RowFunction = Callable[[Tensor], Tensor]


def _row_functions(n: int, k: int) -> dict[str, RowFunction]:
    weight, mlp, norm = _weight(n, k, "int8-g128"), _expert(k, n), _draw(k)
    router, bias, shape = _draw(24, k) / k**0.5, _draw(24, seed=1) / 4, RouterShape(5, 4, 2, True, 2.5)
    return {
        "linear": lambda x: KERNELS.linear(x, weight),
        "swiglu_mlp": lambda x: KERNELS.swiglu_mlp(x, mlp.gate_proj, mlp.up_proj, mlp.down_proj),
        "rms_norm": lambda x: KERNELS.rms_norm(x, norm, 1e-6),
        "router": lambda x: KERNELS.router(x, router, bias, shape)[1],
        "experts": lambda x: _through_experts(mlp, x),
    }


def _through_experts(expert: _Expert, x: Tensor) -> Tensor:
    partial = torch.zeros_like(x)
    KERNELS.experts(x, [(expert, torch.arange(len(x)))], 1, partial)
    return partial


@pytest.mark.parametrize("name", ["linear", "swiglu_mlp", "rms_norm", "router", "experts"])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_rows_do_not_see_each_other(name: str, n: int, k: int) -> None:
    function, x = _row_functions(n, k)[name], _draw(50, k, seed=5)
    whole, rng = function(x), random.Random(0)
    for count in (1, 1, 2, 3, 4, 5, 7, 16, 17, 33):
        rows = rng.sample(range(50), count)
        assert torch.equal(function(x[rows]), whole[rows]), f"{count} rows"
        first = rng.randrange(50 - count)  # a view that begins at any address
        assert torch.equal(function(x[first : first + count]), whole[first : first + count])


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_functions_are_given_whole_vectors(monkeypatch: pytest.MonkeyPatch, n: int, k: int) -> None:
    """On a processor with AVX-512 the test above shows why; this one holds on every processor."""
    sizes = []

    def watched(function: RowFunction) -> RowFunction:
        return lambda x: (sizes.append(x.numel()), function(x))[1]

    monkeypatch.setattr("offload.kernels.reference.silu", watched(torch.nn.functional.silu))
    monkeypatch.setattr(torch, "sigmoid", watched(torch.sigmoid))
    functions, x = _row_functions(n, k), _draw(3, k)
    for rows in (1, 3):
        for name in ("swiglu_mlp", "router"):
            functions[name](x[:rows])
    assert len(sizes) == 4 and all(size % (2 * 512 // 32) == 0 for size in sizes)


@pytest.mark.parametrize(
    ("heads", "rank", "d", "nope", "v"), [(4, 96, 32, 48, 64), (3, 33, 6, 10, 7), (8, 64, 16, 16, 16)]
)
def test_queries_do_not_see_each_other_nor_later_tokens(heads: int, rank: int, d: int, nope: int, v: int) -> None:
    total, start = 2 * KEYS + 40, KEYS + 250
    tokens = total - start
    kv_b = _weight(heads * (nope + v), rank)
    q, q_rope = _draw(tokens, heads, rank), _draw(tokens, heads, d, seed=1)
    q_nope, cache = _draw(tokens, heads, nope, seed=2), _draw(total, rank + d, seed=3)
    k, values, q_full = _draw(total, heads, nope + d), _draw(total, heads, v), _draw(tokens, heads, nope + d, seed=4)

    def run(first: int, last: int) -> list[Tensor]:
        at, seen = start + first, start + last
        return [
            KERNELS.absorb_query(q_nope[first:last], kv_b),
            KERNELS.expand_value(q[first:last], kv_b, v),
            KERNELS.mla_absorbed(q[first:last], q_rope[first:last], cache, at, 0.1),
            KERNELS.attend(q_full[first:last], k[:seen], values[:seen], at, 0.1),
        ]

    whole = run(0, tokens)
    for first, last in [(0, 1), (1, 2), (5, 9), (6, 29), (tokens - 1, tokens)]:
        for part, everything in zip(run(first, last), whole, strict=True):
            assert torch.equal(part, everything[first:last])
