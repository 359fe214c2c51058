"""MLA: both forms agree, and the cache holds what it should."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_oracle import BASE, YARN, Pair, build_pair
from torch import Tensor

import offload.model.attention
from offload.model.attention import EXPAND_FROM, mla

CONFIGS: dict[str, dict[str, Any]] = {
    "plain queries": {"q_lora_rank": None},
    "yarn": {"rope_scaling": YARN},
    "latent of 576": {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "rope_scaling": YARN},
}


def _attend(pair: Pair, x: Tensor, chunks: list[int], absorbed: bool | None) -> tuple[Tensor, Tensor]:
    """Output [T, H] of layer 0 and its cache rows for x [T, H] fed in chunks."""
    cache, out = pair.cache(), []
    for part in x.split(chunks):
        angles = pair.model.rotary[torch.device("cpu")].at(cache.length, len(part))
        weights = pair.model.weights.layers[0].attention
        out.append(mla(part, weights, 0, cache, angles, pair.config, pair.model.kernels, absorbed))
        cache.advance(len(part))
    return torch.cat(out), cache.layers[0][: len(x)]


@pytest.mark.parametrize("name", CONFIGS)
def test_absorbed_equals_expanded(name: str) -> None:
    pair = build_pair(BASE | CONFIGS[name])
    x = torch.randn(60, pair.config.hidden_size, generator=torch.Generator().manual_seed(3))
    expanded, rows = _attend(pair, x, [60], absorbed=False)
    assert expanded.abs().max() > 0.5
    for chunks in ([60], [1] * 60, [23, 1, 36]):
        absorbed, same_rows = _attend(pair, x, chunks, absorbed=True)
        assert (absorbed - expanded).abs().max() <= 1e-5
        assert torch.equal(same_rows, rows)
    mixed, _ = _attend(pair, x, [40, 1, 19], absorbed=None)
    assert (mixed - expanded).abs().max() <= 1e-5


def test_cache_holds_the_normed_latent_and_the_rotated_key() -> None:
    pair = build_pair(BASE | {"rope_scaling": YARN})
    config, weights = pair.config, pair.model.weights.layers[0].attention
    x = torch.randn(20, config.hidden_size, generator=torch.Generator().manual_seed(3))
    _, rows = _attend(pair, x, [13, 7], absorbed=None)
    latent, key = (x @ weights.kv_a.dequantize().float().T).split([config.kv_lora_rank, config.qk_rope_head_dim], 1)
    normed = latent / (latent.square().mean(1, keepdim=True) + 1e-6).sqrt() * weights.kv_a_norm
    cos, sin = pair.model.rotary[torch.device("cpu")].at(0, 20)
    turned = torch.view_as_complex(key.unflatten(1, (-1, 2)).contiguous()) * torch.complex(cos, sin)
    assert rows.shape == (20, config.latent_dim)
    assert torch.allclose(rows[:, : config.kv_lora_rank], normed, atol=1e-5)
    assert torch.allclose(rows[:, config.kv_lora_rank :], torch.view_as_real(turned).flatten(1), atol=1e-5)


def test_only_the_first_chunk_of_a_context_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = build_pair(BASE)
    expand, expanded = offload.model.attention._expand, []
    monkeypatch.setattr(
        offload.model.attention, "_expand", lambda rows, *rest: expanded.append(len(rows)) or expand(rows, *rest)
    )
    x = torch.randn(3 * EXPAND_FROM, pair.config.hidden_size)
    _attend(pair, x, [EXPAND_FROM - 1, EXPAND_FROM, EXPAND_FROM + 1], absorbed=None)
    assert expanded == []
    _attend(pair, x, [EXPAND_FROM, 2 * EXPAND_FROM], absorbed=None)
    assert expanded == [EXPAND_FROM]
