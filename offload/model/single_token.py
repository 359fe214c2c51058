"""Decoding one token over buffers that stay where they are, so that a device can repeat it without the host.

Owns the cut of a layer into what depends on nothing but such buffers (attention, router, shared expert; recorded
once, the position being a number on the device) and the routed experts in between, which are decided anew for
every token. Gives the bits of `DeepseekV3.forward`. Must not know how a recording is made.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from offload.config import ModelConfig
from offload.kernels.device import DeviceKernels
from offload.model.attention import mla_at_position
from offload.model.kv_cache import KVCache
from offload.model.moe import Foresight
from offload.model.place import Place
from offload.model.preference import reroute
from offload.model.transformer import DeepseekV3

_HIDDEN_AT = 16
"""Byte where the hidden state begins in the memory that a step begins with: aligned for any kernel."""


class _Start:
    """What a step begins with, in one piece of memory, so that it travels in one copy."""

    def __init__(self, hidden_size: int, device: torch.device) -> None:
        self.bytes = torch.zeros(_HIDDEN_AT + 4 * hidden_size, dtype=torch.uint8, device=device)
        self.position = self.bytes[:8].view(torch.int64)  # [1]
        self.hidden = self.bytes[_HIDDEN_AT:].view(torch.float32).view(1, hidden_size)


class _Buffers:
    """What the recordings on one device read and write."""

    def __init__(self, config: ModelConfig, place: Place, early: int) -> None:
        hidden, k, device = config.hidden_size, config.num_experts_per_tok, place.device
        start = _Start(hidden, device)
        self.position, self.hidden = start.position, start.hidden
        self.begin = place.sender(start.bytes)
        self.x = torch.zeros(1, hidden, device=device)
        self.shared = torch.zeros(1, hidden, device=device)
        self.ids = torch.zeros(1, k, dtype=torch.int64, device=device)
        self.early = torch.zeros(early, k, dtype=torch.int64, device=device)
        self.scores = torch.zeros(1, k, device=device)


class SingleToken:
    """`model.forward` for one token, with `cache` and no other. Recorded here, at load, while the cache is empty."""

    def __init__(self, model: DeepseekV3, kernels: DeviceKernels, cache: KVCache) -> None:
        assert cache.length == 0, "recording overwrites the first row"
        self._model = model
        self._kernels = kernels
        self._cache = cache
        self._foresight = model.routed if isinstance(model.routed, Foresight) else None
        early = self._foresight.early_routers if self._foresight else 0
        self._devices = list({place.device: place for place in model.places}.values())
        self._buffers: dict[torch.device, _Buffers] = {}
        for place in self._devices:
            with place.scope():
                self._buffers[place.device] = _Buffers(model.config, place, early)
        self._start = _Start(model.config.hidden_size, torch.device("cpu"))
        self._token = torch.zeros(1, dtype=torch.int64)
        self._later = [self._layers_behind(index, early) for index in range(len(model.places))]
        self._before: list[Callable[[], None]] = []
        self._beside: list[Callable[[], None] | None] = []
        self._early: list[Callable[[], None] | None] = []
        for index, (layer, place) in enumerate(zip(model.weights.layers, model.places, strict=True)):
            with place.scope():
                self._before.append(place.record(partial(self._attend_and_route, index)))
                has_shared = layer.moe is not None and layer.moe.shared is not None
                self._beside.append(place.record(partial(self._shared_expert, index)) if has_shared else None)
                self._early.append(place.record(partial(self._route_early, index)) if self._later[index] else None)

    def __call__(self, token: int) -> Tensor:
        """Hidden state [1, H] after the final norm for `token` at position cache.length; appends it to the cache."""
        model, cache = self._model, self._cache
        model.routed.begin_step([token])
        foresight = self._foresight if self._foresight is model.routed and self._foresight.foresight() else None
        self._token[0] = token
        self._start.position[0] = cache.length
        self._start.hidden.copy_(model.weights.embed.rows_of(self._token))
        for place in self._devices:
            with place.scope():
                self._buffers[place.device].begin(self._start.bytes)
        hidden = self._buffers[model.places[0].device].hidden
        for index, place in enumerate(model.places):
            buffers = self._buffers[place.device]
            with place.scope():
                if hidden is not buffers.hidden:
                    buffers.hidden.copy_(hidden)
                    hidden = buffers.hidden
                self._before[index]()
                if model.weights.layers[index].moe is not None:
                    self._routed_experts(index, buffers, foresight)
        cache.advance(1)
        with model.places[-1].scope():
            return self._kernels.rms_norm(hidden, model.weights.norm, model.config.rms_norm_eps)

    def _routed_experts(self, index: int, buffers: _Buffers, foresight: Foresight | None) -> None:
        routed, moe = self._model.routed, self._model.weights.layers[index].moe
        assert moe is not None
        ids, scores = buffers.ids, buffers.scores
        preference = routed.preference(index, ids)
        if preference is not None:
            shape = self._model.router_shape
            ids, scores = reroute(self._kernels, buffers.x, moe.router, moe.bias, shape, preference)
        routed.hint(index, ids, scores)
        beside = self._beside[index]
        if beside is not None:
            beside()
        early = self._early[index]
        if foresight is not None and early is not None:
            early()
            later = self._later[index]
            foresight.foresee(later, buffers.early[: len(later)])
        out = routed(index, buffers.x, ids, scores)
        buffers.hidden.add_(out if beside is None else out + buffers.shared)

    # -- recorded: the same work for every token -----------------------------------------------

    def _attend_and_route(self, index: int) -> None:
        model, kernels = self._model, self._kernels
        layer, place, eps = model.weights.layers[index], model.places[index], model.config.rms_norm_eps
        buffers, table = self._buffers[place.device], model.rotary[place.device]
        angles = table.cos.index_select(0, buffers.position), table.sin.index_select(0, buffers.position)
        x = kernels.rms_norm(buffers.hidden, layer.input_norm, eps)
        rows = self._cache.layers[index]
        attended = mla_at_position(x, layer.attention, rows, buffers.position, angles, model.config, kernels)
        buffers.hidden.add_(attended)
        buffers.x.copy_(kernels.rms_norm(buffers.hidden, layer.post_attention_norm, eps))
        if layer.moe is not None:
            ids, scores = kernels.router(buffers.x, layer.moe.router, layer.moe.bias, model.router_shape)
            buffers.ids.copy_(ids)
            buffers.scores.copy_(scores)
        else:
            assert layer.mlp is not None
            mlp = layer.mlp
            buffers.hidden.add_(kernels.swiglu_mlp(buffers.x, mlp.gate, mlp.up, mlp.down))

    def _shared_expert(self, index: int) -> None:
        moe = self._model.weights.layers[index].moe
        assert moe is not None and moe.shared is not None
        buffers, shared = self._buffers[self._model.places[index].device], moe.shared
        buffers.shared.copy_(self._kernels.swiglu_mlp(buffers.x, shared.gate, shared.up, shared.down))

    def _route_early(self, index: int) -> None:
        """Apply later routers to the state after the shared expert: the routed experts' part is not there yet."""
        model, kernels = self._model, self._kernels
        buffers, moe = self._buffers[model.places[index].device], model.weights.layers[index].moe
        state = buffers.hidden if moe is None or moe.shared is None else buffers.hidden + buffers.shared
        for row, later in enumerate(self._later[index]):
            layer = model.weights.layers[later]
            assert layer.moe is not None
            x = kernels.rms_norm(state, layer.post_attention_norm, model.config.rms_norm_eps)
            ids, _ = kernels.router(x, layer.moe.router, layer.moe.bias, model.router_shape)
            buffers.early[row].copy_(ids[0])

    def _layers_behind(self, index: int, count: int) -> list[int]:
        """Up to `count` MoE layers right behind an MoE layer on the same device."""
        model = self._model
        if model.weights.layers[index].moe is None:
            return []
        after = range(index + 1, min(index + 1 + count, len(model.places)))
        same = [later for later in after if model.places[later].device == model.places[index].device]
        return [later for later in same if model.weights.layers[later].moe is not None]
