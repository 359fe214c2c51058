"""One token over memory that stays: the bits of the blocks of many tokens, layer by layer, and what it refuses."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from test_native_attention import HIDDEN, LATENT, ROPE, make_layer, random, weight
from torch import Tensor

from offload.errors import KernelError
from offload.kernels import AttentionLayer, ModelEnds, MoeLayer, OneToken, RouterShape, native_library
from offload.kernels.native import NativeKernels
from offload.quant import get_codec
from offload.store.layout import ExpertLayout, ExpertWeights

REASON = native_library.available()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"native kernels: {REASON}")

INNER, EXPERTS, TOP, LAYERS, VOCAB = 64, 8, 3, 3, 272
CODEC = "int4-g32"
ROWS = 6


def attention_layer(seed: int) -> AttentionLayer:
    return make_layer(CODEC, CODEC, False, seed)


def moe_layer(seed: int) -> MoeLayer:
    return MoeLayer(
        norm=random(HIDDEN, seed=seed).abs(),
        eps=1e-6,
        router=random(EXPERTS, HIDDEN, seed=seed + 1),
        bias=random(EXPERTS, seed=seed + 2),
        shape=RouterShape(TOP, 4, 2, True, 2.5),
        shared=(
            weight(CODEC, INNER, HIDDEN, seed + 3),
            weight(CODEC, INNER, HIDDEN, seed + 4),
            weight(CODEC, HIDDEN, INNER, seed + 5),
        ),
    )


class Model(NamedTuple):
    attention: list[AttentionLayer]
    moe: list[MoeLayer]
    layout: ExpertLayout
    experts: list[list[ExpertWeights]]
    ends: ModelEnds

    def token(self, kernels: NativeKernels) -> OneToken:
        return kernels.one_token(self.attention, self.moe, self.ends)


def ends(codec: str) -> ModelEnds:
    embed, head = weight(codec, VOCAB, HIDDEN, 7), weight(codec, VOCAB, HIDDEN, 8)
    return ModelEnds(embed, random(HIDDEN, seed=9), 1e-6, head)


@pytest.fixture(scope="module")
def model() -> Model:
    layout = ExpertLayout(get_codec(CODEC), HIDDEN, INNER)

    def expert(seed: int) -> ExpertWeights:
        found = layout.views(torch.zeros(layout.stride, dtype=torch.uint8))
        for at, (name, matrix) in enumerate(found.projections.items()):
            for suffix, part in weight(CODEC, *layout.shape(name), seed + at).parts.items():
                matrix.parts[suffix].copy_(part)
        return found

    return Model(
        [attention_layer(100 * n) for n in range(LAYERS)],
        [moe_layer(100 * n + 50) for n in range(LAYERS)],
        layout,
        [[expert(10_000 + 100 * n + 3 * e) for e in range(EXPERTS)] for n in range(LAYERS)],
        ends("bf16"),
    )


def composed(kernels: NativeKernels, model: Model, row: Tensor, caches: list[Tensor], start: int) -> Tensor:
    hidden, angle = row, random(1, ROPE // 2, seed=start)
    for attention, block, experts, cache in zip(model.attention, model.moe, model.experts, caches, strict=True):
        hidden = kernels.attention(attention, hidden, angle.cos(), angle.sin(), cache, start)
        begun = kernels.begin_moe(block, hidden)
        partial = torch.zeros(TOP, HIDDEN)
        wave = [(experts[e], torch.tensor([j])) for j, e in enumerate(begun.ids[0].tolist())]
        kernels.experts(begun.x, wave, TOP, partial)
        hidden = kernels.end_moe(block, hidden, begun, kernels.combine(partial, begun.ids, begun.weights))
    return hidden


def one_by_one(token: OneToken, kernels: NativeKernels, model: Model, row: Tensor, caches: list[Tensor], start: int):
    angle = random(1, ROPE // 2, seed=start)
    token.begin(start, angle.cos(), angle.sin(), caches, start)
    token.hidden.copy_(row)
    for index, experts in enumerate(model.experts):
        token.attention(index)
        chosen = token.route(index)
        assert token.ids.tolist() == [chosen]
        block = model.moe[-1]
        x = kernels.rms_norm(token.hidden, block.norm, block.eps)
        early = kernels.router(x, block.router, block.bias, block.shape)[0]
        assert token.early(LAYERS - 1) == early[0].tolist()
        assert token.ids.tolist() == [chosen]
        if (start + index) % 2:
            token.finish(index, model.layout, [experts[expert].buffer.data_ptr() for expert in chosen])
        else:
            partial = torch.zeros(TOP, HIDDEN)
            kernels.experts(token.x, [(experts[e], torch.tensor([j])) for j, e in enumerate(chosen)], TOP, partial)
            token.end(index, kernels.combine(partial, token.ids, token.weights))
    return token.hidden.clone()


def new_caches() -> list[Tensor]:
    return [torch.zeros(ROWS, LATENT + ROPE) for _ in range(LAYERS)]


@pytest.mark.parametrize("threads", [1, 3])
def test_bits_of_the_blocks_in_turn(model: Model, threads: int) -> None:
    kernels = NativeKernels(threads=threads)
    token, caches, expected_caches = model.token(kernels), new_caches(), new_caches()
    other, expected_other = new_caches(), new_caches()
    for start in range(ROWS):
        row = random(1, HIDDEN, seed=1000 + start)
        expected = composed(kernels, model, row, expected_caches, start)
        assert torch.equal(one_by_one(token, kernels, model, row, caches, start), expected)
        # Another conversation in between, whose rows lie elsewhere.
        expected = composed(kernels, model, -row, expected_other, start)
        assert torch.equal(one_by_one(token, kernels, model, -row, other, start), expected)
    for ours, right in zip(caches + other, expected_caches + expected_other, strict=True):
        assert torch.equal(ours, right)


def test_refuses_what_does_not_fit(model: Model) -> None:
    kernels = NativeKernels(threads=1)
    token, angle = model.token(kernels), random(1, ROPE // 2, seed=1)
    with pytest.raises(KernelError, match=f"has {ROWS} rows, this call needs {ROWS + 1}"):
        token.begin(0, angle, angle, new_caches(), ROWS)
    for none in (-1, VOCAB):
        with pytest.raises(KernelError, match=f"token {none} is none of the {VOCAB} of the embedding"):
            token.begin(none, angle, angle, new_caches(), 0)
    with pytest.raises(KernelError, match="contiguous float32"):
        token.begin(0, angle, angle, [cache.bfloat16() for cache in new_caches()], 0)
    with pytest.raises(KernelError, match="contiguous float32"):
        token.begin(0, angle, angle, [cache[:, 1:] for cache in new_caches()], 0)
    token.begin(0, angle, angle, new_caches(), 0)
    token.attention(0)
    chosen = token.route(0)
    with pytest.raises(KernelError, match="contiguous float32"):
        token.end(0, torch.zeros(2, HIDDEN))
    with pytest.raises(KernelError, match="do not fit a hidden state"):
        token.finish(0, ExpertLayout(get_codec(CODEC), 2 * HIDDEN, INNER), [0] * TOP)
    with pytest.raises(ValueError, match="same size"):
        token.finish(0, model.layout, [0] * (TOP - 1))
    token.finish(0, model.layout, [model.experts[0][expert].buffer.data_ptr() for expert in chosen])


def test_refuses_bad_activations(model: Model) -> None:
    kernels = NativeKernels(threads=1)
    token, angle = model.token(kernels), random(1, ROPE // 2, seed=1)
    token.begin(0, angle, angle, new_caches(), 0)
    token.hidden.fill_(float("nan"))
    with pytest.raises(KernelError, match="row 0 hold NaN"):
        token.begin_head()
    with pytest.raises(KernelError, match="row 0 hold NaN"):
        token.attention(0)
    token.attended.fill_(float("nan"))
    with pytest.raises(KernelError, match="row 0 hold NaN"):
        token.route(0)


@pytest.mark.parametrize("codec", ["bf16", "int8-g128", "int4-g32", "int4-g128", "fp8", "nf4-b64"])
@pytest.mark.parametrize("threads", [1, 3])
def test_ends_of_a_model(model: Model, codec: str, threads: int) -> None:
    kernels, found = NativeKernels(threads=threads), ends(codec)
    token, angle = kernels.one_token(model.attention, model.moe, found), random(1, ROPE // 2, seed=1)
    for token_id in (0, 1, VOCAB - 1):
        token.begin(token_id, angle, angle, new_caches(), 0)
        assert torch.equal(token.hidden, found.embed.rows_of(torch.tensor([token_id])).float())
        expected = kernels.linear(kernels.rms_norm(token.hidden, found.norm, found.eps), found.head)
        token.begin_head()
        assert torch.equal(token.logits(), expected)
        # Whatever is computed in between ends the head first and leaves its results alone.
        token.begin_head()
        kernels.linear(random(40, HIDDEN, seed=3), found.head)
        token.attention(0)
        token.route(0)
        assert torch.equal(token.logits(), expected)


def test_a_head_that_nobody_waits_for(model: Model) -> None:
    kernels, angle = NativeKernels(threads=3), random(1, ROPE // 2, seed=1)
    token = model.token(kernels)
    for token_id in range(20):
        token.begin(token_id, angle, angle, new_caches(), 0)
        token.begin_head()
    expected = kernels.linear(kernels.rms_norm(token.hidden, model.ends.norm, model.ends.eps), model.ends.head)
    assert torch.equal(token.logits(), expected)
    token.begin_head()
    del token, kernels  # workers may be at it: they end with the context
