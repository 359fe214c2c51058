"""The forward pass: order of calls, the cache's bookkeeping, faults half way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dict_experts import DictExperts
from hf_oracle import BASE, DictSource, Pair, build_pair, official_tensors

from offload.errors import DiskError, UsageError
from offload.kernels.reference import ReferenceKernels
from offload.model.kv_cache import KVCache
from offload.model.transformer import DeepseekV3
from offload.model.weights import load_weights

TOKENS = [5, 9, 2, 100, 5, 33, 17, 64, 1, 0, 127, 3]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return build_pair(BASE | {"num_hidden_layers": 4, "first_k_dense_replace": 2})


def test_experts_are_told_of_a_step_then_hinted_then_called_in_order(pair: Pair) -> None:
    experts = pair.experts
    experts.steps.clear(), experts.calls.clear(), experts.hints.clear()
    cache = pair.cache()
    pair.model.forward(TOKENS, cache)
    pair.model.forward([7], cache)
    assert experts.steps == [TOKENS, [7]]
    assert [layer for layer, _ in experts.calls] == [2, 3, 2, 3]
    assert [layer for layer, _ in experts.hints] == [2, 3, 2, 3]
    for (_, hinted), (_, ids) in zip(experts.hints, experts.calls, strict=True):
        assert torch.equal(hinted, ids)
        assert all(len(set(row)) == pair.config.num_experts_per_tok for row in ids.tolist())


def test_short_chunks_give_the_bits_of_single_tokens(pair: Pair) -> None:
    singles = pair.logits(TOKENS, [1] * len(TOKENS))
    assert torch.equal(pair.logits(TOKENS, [3, 1, 4, 4]), singles)


def test_blocks_give_the_bits_of_one_pass_per_block(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = (TOKENS * 5)[:50]
    monkeypatch.setattr("offload.model.blocks.BLOCK", 20)  # the first block is expanded, the others are absorbed
    layers: list[int] = []
    whole = pair.model.forward(ids, cache := pair.cache(), layers.append)
    assert layers == [1, 2, 3, 4] and cache.length == 50
    pair.experts.calls.clear()
    again = pair.cache()
    parts = [pair.model.forward(ids[first : first + 20], again) for first in (0, 20, 40)]
    assert torch.equal(torch.cat(parts), whole)
    assert all(torch.equal(a, b) for a, b in zip(again.layers, cache.layers, strict=True))
    assert [len(called) for _, called in pair.experts.calls] == [20, 20, 20, 20, 10, 10]


def test_a_router_applied_early_chooses_like_itself_when_nothing_lies_between(pair: Pair) -> None:
    """What separates the two is the attention between them: without it they must agree exactly."""
    built = build_pair(BASE | {"num_hidden_layers": 5, "first_k_dense_replace": 1})
    tensors = official_tensors(built.oracle)
    for layer in range(2, 5):
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"].zero_()
    weights = load_weights(DictSource(tensors), built.config)
    experts = DictExperts(built.experts.kernels, built.experts.experts)
    experts.ahead = 1
    model, cache = DeepseekV3(built.config, weights, built.model.kernels, experts, 512), built.cache()
    model.forward(TOKENS, cache)
    assert experts.expected == []  # only decoding looks ahead
    for token in TOKENS:
        experts.calls.clear(), experts.expected.clear()
        model.forward([token], cache)
        chosen = {layer: ids[0].tolist() for layer, ids in experts.calls}
        early = dict(experts.expected)
        assert list(early) == [1, 2, 3, 4]
        assert all(early[layer] == chosen[layer] for layer in (2, 3, 4))
    experts.ahead, experts.expected = 2, []
    model.forward([1], cache)
    assert [layer for layer, _ in experts.expected] == [1, 2, 2, 3, 3, 4, 4]


def test_truncated_cache_gives_the_same_bits_again(pair: Pair) -> None:
    cache = pair.cache()
    pair.model.forward(TOKENS[:6], cache)
    first = pair.model.forward(TOKENS[6:], cache)
    cache.truncate(6)
    pair.model.forward([90, 91, 92], cache)
    cache.truncate(6)
    assert torch.equal(pair.model.forward(TOKENS[6:], cache), first)


def test_conversations_do_not_mix(pair: Pair) -> None:
    one, other = pair.cache(), pair.cache()
    pair.model.forward([1, 2, 3], other)
    pair.model.forward(TOKENS, one)
    pair.model.forward([4], other)
    fresh = pair.cache()
    assert torch.equal(pair.model.forward(TOKENS, fresh), pair.model.forward(TOKENS, pair.cache()))
    assert (one.length, other.length) == (len(TOKENS), 4)


def test_full_context_is_refused_with_the_numbers_and_changes_nothing(pair: Pair) -> None:
    cache = pair.cache(capacity=14)
    pair.model.forward(TOKENS, cache)
    with pytest.raises(UsageError, match="15 tokens .* context of 14"):
        pair.model.forward([1, 2, 3], cache)
    assert cache.length == 12
    pair.model.forward([1, 2], cache)
    assert cache.length == 14


def test_a_fault_half_way_leaves_the_cache_usable(pair: Pair) -> None:
    cache = pair.cache()
    pair.model.forward(TOKENS[:6], cache)
    expected = pair.model.forward(TOKENS[6:], cache)
    cache.truncate(6)

    class Failing(type(pair.experts)):  # type: ignore[misc]
        def __call__(self, layer: int, *rest: torch.Tensor) -> torch.Tensor:
            if layer == 3:
                raise DiskError("cannot read expert 3 of layer 3")
            return super().__call__(layer, *rest)

    failing = Failing(pair.experts.kernels, pair.experts.experts)
    with pytest.raises(DiskError):
        DeepseekV3(pair.config, pair.model.weights, pair.model.kernels, failing, 512).forward(TOKENS[6:], cache)
    assert cache.length == 6
    assert torch.equal(pair.model.forward(TOKENS[6:], cache), expected)


def test_cache_is_allocated_once_and_holds_latents_only(pair: Pair) -> None:
    cache = KVCache(pair.config, 100)
    assert [rows.shape for rows in cache.layers] == [(100, 40 + 16)] * 4
    before = [rows.data_ptr() for rows in cache.layers]
    pair.model.forward(TOKENS, cache)
    assert [rows.data_ptr() for rows in cache.layers] == before
    for rows in cache.layers:
        assert rows[: len(TOKENS)].abs().amax(1).min() > 0
        assert not rows[len(TOKENS) :].any()


@pytest.mark.parametrize(
    ("stored", "kept"),
    [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (torch.float16, torch.float32)],
)
def test_resident_weights_keep_their_format_and_the_router_its_precision(
    stored: torch.dtype, kept: torch.dtype
) -> None:
    built = build_pair(BASE)
    tensors = official_tensors(built.oracle)
    gate = "model.layers.1.mlp.gate.weight"
    tensors[gate] = tensors[gate].to(stored)
    weights = load_weights(DictSource(tensors, "int8-g128"), built.config)
    moe = weights.layers[1].moe
    assert moe is not None
    assert moe.bias.dtype == torch.float32 and moe.router.dtype == kept
    assert torch.equal(moe.router.float(), tensors[gate].float())
    assert torch.equal(moe.bias, tensors["model.layers.1.mlp.gate.e_score_correction_bias"])
    assert weights.layers[1].attention.o.codec.name == "int8-g128"
    assert weights.layers[0].moe is None
    assert weights.layers[0].mlp is not None


def test_without_shared_expert() -> None:
    built = build_pair(BASE)
    tensors = {name: t for name, t in official_tensors(built.oracle).items() if "shared_experts" not in name}
    config = replace(built.config, n_shared_experts=0)
    model = DeepseekV3(config, load_weights(DictSource(tensors), config), ReferenceKernels(), built.experts, 512)
    for layer in built.oracle.model.layers[config.first_k_dense_replace :]:
        layer.mlp.shared_experts.down_proj.weight.data.zero_()
    got = model.logits(model.forward(TOKENS, built.cache()))
    assert (got - built.expected(TOKENS)).abs().max() <= 1e-4
