"""One token over memory that stays: the bits of the blocks of many tokens, layer by layer, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from test_native_attention import HIDDEN, LATENT, ROPE, make_layer, random, weight
from torch import Tensor

from offload.errors import KernelError
from offload.kernels import (
    AttentionLayer,
    Block,
    DenseLayer,
    ModelEnds,
    MoeLayer,
    OneToken,
    Residents,
    RouterShape,
    native_library,
)
from offload.kernels.native import NativeKernels
from offload.quant import get_codec
from offload.store.layout import ExpertLayout, ExpertWeights

REASON = native_library.available()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"native kernels: {REASON}")

INNER, EXPERTS, TOP, FIRST, LAYERS, VOCAB = 64, 8, 3, 1, 4, 272
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


def dense_layer(seed: int) -> DenseLayer:
    gate, up, down = (weight(CODEC, *shape, seed + n) for n, shape in enumerate([(96, HIDDEN)] * 2 + [(HIDDEN, 96)]))
    return DenseLayer(random(HIDDEN, seed=seed).abs(), 1e-6, (gate, up, down))


class Model(NamedTuple):
    attention: list[AttentionLayer]
    blocks: list[Block]
    layout: ExpertLayout
    experts: list[list[ExpertWeights]]
    ends: ModelEnds

    def token(self, kernels: NativeKernels) -> OneToken:
        return kernels.one_token(self.attention, self.blocks, self.ends)

    def residents(self) -> Residents:
        """Every expert of every layer, the last one in the first slot."""
        addresses = [expert.buffer.data_ptr() for experts in self.experts[FIRST:] for expert in experts][::-1]
        slots = np.arange(len(addresses), dtype=np.int32)[::-1].reshape(-1, EXPERTS).copy()
        return Residents(self.layout, FIRST, slots, np.array(addresses, np.uint64))


Way = Callable[[OneToken, NativeKernels, Model, Tensor, list[Tensor], int], Tensor]


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
        [moe_layer(100 * n + 50) if n >= FIRST else dense_layer(100 * n + 50) for n in range(LAYERS)],
        layout,
        [[expert(10_000 + 100 * n + 3 * e) for e in range(EXPERTS)] for n in range(LAYERS)],
        ends("bf16"),
    )


def composed(kernels: NativeKernels, model: Model, row: Tensor, caches: list[Tensor], start: int) -> Tensor:
    hidden, angle = row, random(1, ROPE // 2, seed=start)
    for attention, block, experts, cache in zip(model.attention, model.blocks, model.experts, caches, strict=True):
        hidden = kernels.attention(attention, hidden, angle.cos(), angle.sin(), cache, start)
        if isinstance(block, DenseLayer):
            hidden = hidden + kernels.swiglu_mlp(kernels.rms_norm(hidden, block.norm, block.eps), *block.mlp)
            continue
        begun = kernels.begin_moe(block, hidden)
        partial = torch.zeros(TOP, HIDDEN)
        wave = [(experts[e], torch.tensor([j])) for j, e in enumerate(begun.ids[0].tolist())]
        kernels.experts(begun.x, wave, TOP, partial)
        hidden = kernels.end_moe(block, hidden, begun, kernels.combine(partial, begun.ids, begun.weights))
    return hidden


def one_by_one(token: OneToken, kernels: NativeKernels, model: Model, row: Tensor, caches: list[Tensor], start: int):
    """Layer by layer; where an expert is missing, the rest of the layer comes from single calls."""
    angle = random(1, ROPE // 2, seed=start)
    token.begin(start, angle.cos(), angle.sin(), caches, start)
    token.hidden.copy_(row)
    for index in range(len(model.blocks)):
        if not isinstance(block := model.blocks[index], MoeLayer):
            assert token.run(index, index + 1, None) == index + 1
            continue
        assert token.run(index, index + 1, None) == index
        chosen = token.chosen(index)
        assert token.ids(index).tolist() == [chosen]
        x = kernels.rms_norm(token.hidden, block.norm, block.eps)
        early = kernels.router(x, block.router, block.bias, block.shape)[0]
        assert token.early(index) == early[0].tolist()
        assert token.ids(index).tolist() == [chosen]
        if (start + index) % 2:
            assert token.run(index, index + 1, model.residents(), routed=True) == index + 1
        else:
            partial = torch.zeros(TOP, HIDDEN)
            wave = [(model.experts[index][e], torch.tensor([j])) for j, e in enumerate(chosen)]
            kernels.experts(token.x, wave, TOP, partial)
            token.end(index, kernels.combine(partial, token.ids(index), token.weights))
    return token.hidden.clone()


def in_one_go(token: OneToken, kernels: NativeKernels, model: Model, row: Tensor, caches: list[Tensor], start: int):
    """As far as experts are at hand, of which one of the routers' choice is taken away wherever the token stops."""
    angle = random(1, ROPE // 2, seed=start)
    token.begin(start, angle.cos(), angle.sin(), caches, start)
    token.hidden.copy_(row)
    residents, done, count = model.residents(), 0, len(model.blocks)
    missing = [FIRST + start % (count - FIRST)] if start % 3 else []
    for index in missing:
        residents.slots[index - FIRST].fill(-1)
    stops = []
    while (done := token.run(done, count, residents, routed=bool(stops) and stops[-1] == done)) < count:
        stops.append(done)
        residents.slots[done - FIRST] = model.residents().slots[done - FIRST]
    assert stops == missing
    return token.hidden.clone()


def new_caches() -> list[Tensor]:
    return [torch.zeros(ROWS, LATENT + ROPE) for _ in range(LAYERS)]


@pytest.mark.parametrize("way", [one_by_one, in_one_go])
@pytest.mark.parametrize("threads", [1, 3])
def test_bits_of_the_blocks_in_turn(model: Model, threads: int, way: Way) -> None:
    kernels = NativeKernels(threads=threads)
    token, caches, expected_caches = model.token(kernels), new_caches(), new_caches()
    other, expected_other = new_caches(), new_caches()
    for start in range(ROWS):
        row = random(1, HIDDEN, seed=1000 + start)
        expected = composed(kernels, model, row, expected_caches, start)
        assert torch.equal(way(token, kernels, model, row, caches, start), expected)
        # Another conversation in between, whose rows lie elsewhere.
        expected = composed(kernels, model, -row, expected_other, start)
        assert torch.equal(way(token, kernels, model, -row, other, start), expected)
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
    assert token.run(0, LAYERS, None) == FIRST
    with pytest.raises(KernelError, match="contiguous float32"):
        token.end(FIRST, torch.zeros(2, HIDDEN))
    right = model.residents()
    for wrong, words in (
        (replace(right, layout=ExpertLayout(get_codec(CODEC), 2 * HIDDEN, INNER)), "do not fit a hidden state"),
        (replace(right, first=0), r"from layer 0 on does not fit layers \[1, 2, 3\]"),
        (replace(right, slots=right.slots[:, 1:].copy()), rf"table of \(3, {EXPERTS - 1}\) experts"),
        (replace(right, slots=right.slots.astype(np.int64)), "slots in int32"),
        (replace(right, slots=right.slots[:, ::-1]), "contiguous slots"),
        (replace(right, addresses=right.addresses.astype(np.int64)), "addresses in uint64"),
    ):
        with pytest.raises(KernelError, match=words):
            token.run(FIRST, LAYERS, wrong, routed=True)
    assert token.run(FIRST, LAYERS, right, routed=True) == LAYERS
    gate, up, down = model.blocks[0].mlp
    mixed = DenseLayer(model.blocks[0].norm, 1e-6, (gate, weight("int8-g128", up.rows, up.cols, 1), down))
    with pytest.raises(KernelError, match="gate is int4-g32 and up int8-g128"):
        kernels.one_token(model.attention, [mixed, *model.blocks[1:]], model.ends)


def test_refuses_bad_activations(model: Model) -> None:
    kernels = NativeKernels(threads=1)
    token, angle = model.token(kernels), random(1, ROPE // 2, seed=1)
    token.begin(0, angle, angle, new_caches(), 0)
    token.hidden.fill_(float("nan"))
    with pytest.raises(KernelError, match="row 0 hold NaN"):
        token.begin_head()
    for first in range(LAYERS):
        with pytest.raises(KernelError, match="row 0 hold NaN"):
            token.run(first, LAYERS, model.residents())
    token.x.fill_(float("nan"))
    with pytest.raises(KernelError, match="row 0 hold NaN"):
        token.run(FIRST, LAYERS, model.residents(), routed=True)


@pytest.mark.parametrize("codec", ["bf16", "int8-g128", "int4-g32", "int4-g128", "fp8", "nf4-b64"])
@pytest.mark.parametrize("threads", [1, 3])
def test_ends_of_a_model(model: Model, codec: str, threads: int) -> None:
    kernels, found = NativeKernels(threads=threads), ends(codec)
    token, angle = kernels.one_token(model.attention, model.blocks, found), random(1, ROPE // 2, seed=1)
    for token_id in (0, 1, VOCAB - 1):
        token.begin(token_id, angle, angle, new_caches(), 0)
        assert torch.equal(token.hidden, found.embed.rows_of(torch.tensor([token_id])).float())
        expected = kernels.linear(kernels.rms_norm(token.hidden, found.norm, found.eps), found.head)
        token.begin_head()
        assert torch.equal(token.logits(), expected)
        # Whatever is computed in between ends the head first and leaves its results alone.
        token.begin_head()
        kernels.linear(random(40, HIDDEN, seed=3), found.head)
        token.run(0, LAYERS, None)
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
