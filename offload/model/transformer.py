"""The decoder: layers in order, residual stream in fp32, final norm and head.

Owns the forward pass. It is given weights, kernels and whoever computes routed experts, and keeps no
state but the cache it is handed. Must not know tiers, stores or tokenizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from offload.config import ModelConfig
from offload.kernels import Block, FusedKernels, Kernels, ModelEnds, OneToken
from offload.model.attention import EXPAND_FROM, AttentionWeights, attention_layer, mla
from offload.model.blocks import BLOCK, blocks
from offload.model.kv_cache import KVCache
from offload.model.moe import (
    ExpertsAtHand,
    MlpWeights,
    MoeWeights,
    RoutedExperts,
    dense_layer,
    fused_moe,
    mlp,
    moe,
    moe_layer,
    router_shape,
    stopped_layer,
)
from offload.model.place import Place
from offload.model.rope import RotaryTable
from offload.quant import QuantizedTensor


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer; exactly one of `mlp` (dense) and `moe` is set."""

    input_norm: Tensor
    attention: AttentionWeights
    post_attention_norm: Tensor
    mlp: MlpWeights | None
    moe: MoeWeights | None


@dataclass(frozen=True)
class ModelWeights:
    """All resident weights."""

    embed: QuantizedTensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: QuantizedTensor


class ForSingleTokens(Protocol):
    """The decoder for one token at a time, with one cache."""

    @property
    def routed(self) -> RoutedExperts: ...

    def __call__(self, token: int) -> Tensor:
        """Hidden state [1, H] after the final norm for `token`, which is appended to the cache."""
        ...


class DeepseekV3:
    """A DeepSeek-V3 class decoder. `context` bounds the positions it can be asked for."""

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        kernels: Kernels,
        routed: RoutedExperts,
        context: int,
        places: Sequence[Place] | None = None,
    ) -> None:
        """`places`: where each layer is computed and its weights and cache lie; the CPU unless given."""
        self.config = config
        self.weights = weights
        self.kernels = kernels
        self.routed = routed
        self.places = places or [Place(torch.device("cpu"))] * config.num_hidden_layers
        rotary = RotaryTable(config, context)
        self.rotary = {place.device: rotary.to(place.device) for place in self.places}
        self.router_shape = router_shape(config)
        self.single: ForSingleTokens | None = None
        """Takes the place of `forward` for single tokens, if set, as long as `routed` is who it was made for."""
        self._fused = kernels if isinstance(kernels, FusedKernels) else None
        self._attention = [attention_layer(layer.attention, layer.input_norm, config) for layer in weights.layers]
        self._moe = {
            index: moe_layer(layer.moe, layer.post_attention_norm, config)
            for index, layer in enumerate(weights.layers)
            if layer.moe is not None
        }
        self._token: OneToken | None = None
        if self._fused is not None:
            ends = ModelEnds(weights.embed, weights.norm, config.rms_norm_eps, weights.head)
            self._token = self._fused.one_token(self._attention, self._blocks(), ends)

    @property
    def routed(self) -> RoutedExperts:
        """Whoever computes the routed experts."""
        return self._routed

    @routed.setter
    def routed(self, routed: RoutedExperts) -> None:
        self._routed = routed
        # Asked once, as for the kernels below: a check against a protocol takes tens of microseconds.
        self._at_hand = routed if isinstance(routed, ExpertsAtHand) else None

    def forward(self, token_ids: list[int], cache: KVCache, progress: Callable[[int], None] | None = None) -> Tensor:
        """Hidden states [T, H] after the final norm for tokens at positions cache.length .. + T.

        Appends them to `cache`. Raises UsageError when they do not fit. `progress` is called after each layer with
        the number of layers done.
        """
        cache.require(len(token_ids))
        if self.single is not None and len(token_ids) == 1 and self.single.routed is self._routed:
            return self.single(token_ids[0])
        self.routed.begin_step(token_ids)
        if self._token is not None and self._at_hand is not None and len(token_ids) == 1:
            self._one_token(token_ids[0], cache, self._token, self._at_hand, progress)
            self._at_hand.end_step(self._token)
            return self.kernels.rms_norm(self._token.hidden, self.weights.norm, self.config.rms_norm_eps)
        parts = {device: _parts(table, cache.length, len(token_ids)) for device, table in self.rotary.items()}
        hidden = self.weights.embed.rows_of(torch.tensor(token_ids))  # [T, H], bf16 on its way to a device
        ahead = self.routed.lookahead() if len(token_ids) == 1 else 0
        for index, (layer, place) in enumerate(zip(self.weights.layers, self.places, strict=True)):
            own = parts[place.device]
            with place.scope():
                hidden = hidden.to(place.device).float()
                if self._fused is not None and len(token_ids) < EXPAND_FROM:
                    hidden = self._short_layer(index, layer, hidden, cache, own[0][1], self._fused)
                else:
                    hidden = self._layer(index, layer, hidden, cache, own)
            if ahead:
                self._foresee(index, ahead, partial(self._early, hidden))
            if progress is not None:
                progress(index + 1)
        cache.advance(len(token_ids))
        with self.places[-1].scope():
            return self.kernels.rms_norm(hidden, self.weights.norm, self.config.rms_norm_eps)

    def next_logits(self, token_id: int, cache: KVCache) -> Tensor:
        """Logits [1, vocab] behind one token: `logits` of what `forward` gives for it, in fewer calls where the backend
        has them."""
        token, at_hand = self._token, self._at_hand
        if token is None or at_hand is None:
            return self.logits(self.forward([token_id], cache))
        cache.require(1)
        at_hand.begin_step([token_id])
        self._one_token(token_id, cache, token, at_hand)
        token.begin_head()
        at_hand.end_step(token)
        return token.logits()

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [T, vocab] of final hidden states [T, H]."""
        with self.places[-1].scope():
            return self.kernels.linear(hidden, self.weights.head)

    def rehearse(self, lengths: Sequence[int], cache: KVCache, routed: RoutedExperts) -> None:
        """Run passes of so many tokens, as many as `cache` holds at most, through the first layer of each kind on each
        device, and the head, with `routed` in place of the experts. Nothing is kept.

        The first launch of a kernel compiles it, or loads what was compiled before, and the first call of a library
        makes what it needs: seconds on a new installation and a fifth of one later, which belong to loading.
        """
        assert cache.length == 0, "a rehearsal overwrites the first rows"
        passes = [(0, tokens) for tokens in lengths]
        half = min(BLOCK, cache.capacity // 2, max(lengths, default=0))
        if half:  # one that follows others, too
            passes.append((half, half))
        kinds: dict[tuple[Place, bool], int] = {}
        for index, (layer, place) in enumerate(zip(self.weights.layers, self.places, strict=True)):
            kinds.setdefault((place, layer.moe is None), index)
        own, self.routed = self.routed, routed
        try:
            for start, tokens in passes:
                cache.advance(start)
                self._rehearse_pass(kinds.values(), tokens, cache)
                cache.truncate(0)
        finally:
            self.routed = own
            cache.truncate(0)

    def _rehearse_pass(self, layers: Iterable[int], tokens: int, cache: KVCache) -> None:
        self.routed.begin_step([0] * tokens)
        for index in layers:
            place = self.places[index]
            parts = _parts(self.rotary[place.device], cache.length, tokens)
            with place.scope():
                hidden = torch.zeros(tokens, self.config.hidden_size, device=place.device)
                hidden = self._layer(index, self.weights.layers[index], hidden, cache, parts)
        with self.places[-1].scope():  # where the last of these layers is
            last = self.kernels.rms_norm(hidden, self.weights.norm, self.config.rms_norm_eps)[-1:]
        self.logits(last)

    def _layer(
        self,
        index: int,
        layer: LayerWeights,
        hidden: Tensor,
        cache: KVCache,
        parts: list[_Part],
    ) -> Tensor:
        """The residual stream [T, H] after a layer; `hidden` is overwritten. `parts`: blocks and their rotations."""
        kernels, eps = self.kernels, self.config.rms_norm_eps
        x = torch.empty_like(hidden)
        for rows, angles in parts:
            normed = kernels.rms_norm(hidden[rows], layer.input_norm, eps)
            hidden[rows] += mla(normed, layer.attention, index, cache, angles, self.config, kernels, first=rows.start)
            x[rows] = kernels.rms_norm(hidden[rows], layer.post_attention_norm, eps)
        if layer.moe is not None:
            return hidden + moe(x, layer.moe, index, self.router_shape, self.routed, kernels)
        assert layer.mlp is not None
        return hidden + mlp(x, layer.mlp, kernels)

    def _short_layer(
        self,
        index: int,
        layer: LayerWeights,
        hidden: Tensor,
        cache: KVCache,
        angles: tuple[Tensor, Tensor],
        fused: FusedKernels,
    ) -> Tensor:
        """A layer for few tokens, whose attention is absorbed: the same values in as few calls as the backend needs."""
        hidden = fused.attention(self._attention[index], hidden, *angles, cache.layers[index], cache.length)
        if layer.moe is not None:
            return fused_moe(hidden, self._moe[index], index, self.routed, fused)
        assert layer.mlp is not None
        x = fused.rms_norm(hidden, layer.post_attention_norm, self.config.rms_norm_eps)
        return hidden + mlp(x, layer.mlp, fused)

    def _one_token(
        self,
        token_id: int,
        cache: KVCache,
        token: OneToken,
        at_hand: ExpertsAtHand,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """All layers for one token, on the processor: the values of `forward` over memory that stays."""
        count, done = len(self.weights.layers), 0
        token.begin(token_id, *self.rotary[self.places[0].device].at(cache.length, 1), cache.layers, cache.length)
        ahead, residents = at_hand.lookahead(), at_hand.residents()
        one_by_one = ahead > 0 or progress is not None
        while done < count:
            last = done + 1 if one_by_one else count
            done = token.run(done, last, residents)
            if done < last:
                stopped_layer(done, token, self._moe[done], at_hand, self.kernels)
                done += 1
            if ahead:
                at_hand.ran(token, done)
                self._foresee(done - 1, ahead, token.early)
            if progress is not None:
                progress(done)
        cache.advance(1)

    def _blocks(self) -> list[Block]:
        """What follows attention in each layer, as fused backends take it."""
        blocks: list[Block] = []
        for index, layer in enumerate(self.weights.layers):
            if layer.mlp is None:
                blocks.append(self._moe[index])
            else:
                blocks.append(dense_layer(layer.mlp, layer.post_attention_norm, self.config))
        return blocks

    def _foresee(self, index: int, ahead: int, early: Callable[[int], list[int]]) -> None:
        """Tell what the next `ahead` routers would choose for the state after layer `index`: `early` of each.

        The residual stream changes slowly: the next router sees this state after one more attention, and most of its
        choice is the same. Told now, experts can be read while that attention is computed.
        """
        for later in range(index + 1, min(index + 1 + ahead, len(self.weights.layers))):
            if later in self._moe:
                self.routed.expect(later, early(later))

    def _early(self, hidden: Tensor, later: int) -> list[int]:
        """What the router of layer `later` would choose for hidden [1, H], best first."""
        layer = self.weights.layers[later]
        assert layer.moe is not None
        x = self.kernels.rms_norm(hidden, layer.post_attention_norm, self.config.rms_norm_eps)
        ids, _ = self.kernels.router(x, layer.moe.router, layer.moe.bias, self.router_shape)
        return ids[0].tolist()


_Part = tuple[slice, tuple[Tensor, Tensor]]
"""Rows of a pass and their rotations."""


def _parts(table: RotaryTable, start: int, tokens: int) -> list[_Part]:
    """The blocks of a pass at positions start .. start + tokens."""
    cos, sin = table.at(start, tokens)
    return [(rows, (cos[rows], sin[rows])) for rows in blocks(tokens)]
