"""Decoding one token over buffers that stay where they are, so that a device can repeat it without the host.

Owns the cut of a step into recordings, made once (the position is a number on the device), and what the host does
between them. Each device begins with the rotation of the position; a layer is
    before      the sum of the layer before, attention, router      recorded
    send        ids to the host, tables to the device
    beside      experts that the device has, shared expert          recorded
    complete    the other experts, decided anew for every token
so that a device which has all experts of a layer never waits for its host. Gives the bits of `DeepseekV3.forward`.
Must not know how a recording is made.
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
from offload.model.moe import DeviceExperts
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
        self.row = torch.zeros(1, dtype=torch.int32, device=device)
        """The position again, as kernels take it."""
        half = config.qk_rope_head_dim // 2
        self.angles = torch.zeros(1, half, device=device), torch.zeros(1, half, device=device)
        self.x = torch.zeros(1, hidden, device=device)
        self.shared = torch.zeros(1, hidden, device=device)
        self.ids = torch.zeros(1, k, dtype=torch.int64, device=device)
        self.early = torch.zeros(early, k, dtype=torch.int64, device=device)
        self.scores = torch.zeros(1, k, device=device)
        self.normed = torch.zeros(1, hidden, device=device)


class SingleToken:
    """`model.forward` for one token, with `cache` and no other. Recorded here, at load, while the cache is empty."""

    def __init__(self, model: DeepseekV3, routed: DeviceExperts, kernels: DeviceKernels, cache: KVCache) -> None:
        assert cache.length == 0, "recording overwrites the first row"
        self.routed = routed
        self._model = model
        self._kernels = kernels
        self._cache = cache
        early = routed.early_routers
        self._devices = list(dict.fromkeys(model.places))
        self._buffers: dict[Place, _Buffers] = {}
        for place in self._devices:
            with place.scope():
                self._buffers[place] = _Buffers(model.config, place, early)
        self._start = _Start(model.config.hidden_size, torch.device("cpu"))
        self._token = torch.zeros(1, dtype=torch.int64)
        self._later = [self._layers_behind(index, early) for index in range(len(model.places))]
        self._rotation: dict[Place, Callable[[], None]] = {}
        self._before: list[Callable[[], None]] = []
        self._beside: list[Callable[[], None] | None] = []
        self._early: list[Callable[[], None] | None] = []
        self._last: dict[int, Callable[[], None]] = {}
        """By layer: what ends the last one on a device."""
        for index, (layer, place) in enumerate(zip(model.weights.layers, model.places, strict=True)):
            with place.scope():
                # In the order in which they will be repeated.
                if place not in self._rotation:
                    self._rotation[place] = place.record(partial(self._rotate, place))
                self._before.append(place.record(partial(self._attend_and_route, index)))
                self._beside.append(place.record(partial(self._present, index)) if layer.moe is not None else None)
                self._early.append(place.record(partial(self._route_early, index)) if self._later[index] else None)
                if not self._continues(index + 1):
                    self._last[index] = place.record(partial(self._end, index))

    def __call__(self, token: int) -> Tensor:
        """Hidden state [1, H] after the final norm for `token` at position cache.length; appends it to the cache."""
        model, cache = self._model, self._cache
        self.routed.begin_step([token])
        foresight = self.routed.foresight() > 0
        self._token[0] = token
        self._start.position[0] = cache.length
        self._start.hidden.copy_(model.weights.embed.rows_of(self._token))
        for place in self._devices:
            with place.scope():
                self._buffers[place].begin(self._start.bytes)
                self._rotation[place]()
        for index, place in enumerate(model.places):
            with place.scope():
                if index and not self._continues(index):
                    self._move(model.places[index - 1], place)
                self._before[index]()
                if model.weights.layers[index].moe is not None:
                    self._experts(index, place, foresight)
                if index in self._last:
                    self._last[index]()
        cache.advance(1)
        place = model.places[-1]
        with place.scope():
            return place.call(lambda: self._buffers[place].normed)

    def _experts(self, index: int, place: Place, foresight: bool) -> None:
        routed, buffers = self.routed, self._buffers[place]
        preference = routed.preference(index, buffers.ids)
        if preference is not None:
            self._reroute(index, place, preference)
        routed.send(index, buffers.ids)
        beside, early = self._beside[index], self._early[index]
        assert beside is not None
        beside()
        if foresight and early is not None:
            early()
            later = self._later[index]
            routed.foresee(later, buffers.early[: len(later)])
        routed.complete(index, buffers.x)

    def _reroute(self, index: int, place: Place, preference: Tensor) -> None:
        model, buffers = self._model, self._buffers[place]
        moe = model.weights.layers[index].moe
        assert moe is not None

        def again() -> Tensor:
            ids, scores = reroute(self._kernels, buffers.x, moe.router, moe.bias, model.router_shape, preference)
            buffers.scores.copy_(scores)
            return buffers.ids.copy_(ids)

        place.call(again)

    def _move(self, before: Place, here: Place) -> None:
        """The residual stream goes on to another device."""
        source, target = self._buffers[before].hidden, self._buffers[here].hidden
        with before.scope():
            before.call(lambda: source)
        here.call(lambda: target.copy_(source))

    # -- recorded: the same work for every token -----------------------------------------------

    def _rotate(self, place: Place) -> None:
        buffers, table = self._buffers[place], self._model.rotary[place.device]
        for target, source in zip(buffers.angles, (table.cos, table.sin), strict=True):
            torch.index_select(source, 0, buffers.position, out=target)
        buffers.row.copy_(buffers.position)

    def _attend_and_route(self, index: int) -> None:
        model, kernels = self._model, self._kernels
        layer, eps = model.weights.layers[index], model.config.rms_norm_eps
        buffers = self._buffers[model.places[index]]
        if self._continues(index):
            self._add_experts(index - 1)
        x = kernels.rms_norm(buffers.hidden, layer.input_norm, eps)
        at, rows = (buffers.position, buffers.row), self._cache.layers[index]
        attended = mla_at_position(x, layer.attention, rows, at, buffers.angles, model.config, kernels)
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

    def _present(self, index: int) -> None:
        moe = self._model.weights.layers[index].moe
        assert moe is not None
        buffers, shared = self._buffers[self._model.places[index]], moe.shared
        self.routed.present(index, buffers.x, buffers.ids)
        if shared is not None:
            buffers.shared.copy_(self._kernels.swiglu_mlp(buffers.x, shared.gate, shared.up, shared.down))

    def _route_early(self, index: int) -> None:
        """Apply later routers to the state after the shared expert: the routed experts' part is not there yet."""
        model, kernels = self._model, self._kernels
        buffers, moe = self._buffers[model.places[index]], model.weights.layers[index].moe
        state = buffers.hidden if moe is None or moe.shared is None else buffers.hidden + buffers.shared
        for row, later in enumerate(self._later[index]):
            layer = model.weights.layers[later]
            assert layer.moe is not None
            x = kernels.rms_norm(state, layer.post_attention_norm, model.config.rms_norm_eps)
            ids, _ = kernels.router(x, layer.moe.router, layer.moe.bias, model.router_shape)
            buffers.early[row].copy_(ids[0])

    def _end(self, index: int) -> None:
        """The last layer on a device: its experts are added, and behind the last of all comes the final norm."""
        model = self._model
        self._add_experts(index)
        if index + 1 == len(model.places):
            buffers = self._buffers[model.places[index]]
            buffers.normed.copy_(self._kernels.rms_norm(buffers.hidden, model.weights.norm, model.config.rms_norm_eps))

    def _add_experts(self, index: int) -> None:
        """Experts of layer `index` into the residual stream, if it has any."""
        moe = self._model.weights.layers[index].moe
        if moe is None:
            return
        buffers = self._buffers[self._model.places[index]]
        out = self.routed.combined(index, buffers.ids, buffers.scores)
        buffers.hidden.add_(out if moe.shared is None else out + buffers.shared)

    # -- which layer is where ------------------------------------------------------------------

    def _continues(self, index: int) -> bool:
        """Whether layer `index` follows another one on the same device."""
        places = self._model.places
        return 0 < index < len(places) and places[index] == places[index - 1]

    def _layers_behind(self, index: int, count: int) -> list[int]:
        """Up to `count` MoE layers right behind an MoE layer on the same device."""
        model = self._model
        if model.weights.layers[index].moe is None:
            return []
        after = range(index + 1, min(index + 1 + count, len(model.places)))
        same = [later for later in after if model.places[later] == model.places[index]]
        return [later for later in same if model.weights.layers[later].moe is not None]
