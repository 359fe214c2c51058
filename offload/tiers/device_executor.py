"""Routed experts computed on accelerators, in the VRAM slots where their bytes lie or are copied to.

Owns the way of a layer through the tiers: ids to the host, decisions, kernels and copies queued, the sum.
Satisfies the model's `RoutedExperts` and, for decoding, its `DeviceExperts`. Every expert's output goes to its own
row of `partial`, and the rows are summed in a fixed order: which experts were resident, and when the others arrived,
changes no bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offload.cache.lookahead import EARLY_ROUTERS
from offload.cache.policy import Routing
from offload.cache.trace import Trace
from offload.kernels import Kernels
from offload.kernels.device import DeviceKernels
from offload.telemetry import Telemetry, TierCounters
from offload.tiers.device import Device, Event
from offload.tiers.launches import LayerJob
from offload.tiers.ram import RamTier
from offload.tiers.rehearsal import RehearsedExperts
from offload.tiers.slot_reads import ExpertStore
from offload.tiers.vram import VramTier


@dataclass(frozen=True)
class DeviceShare:
    """What one device gets: MoE layers `first` to `last` (decoder layers, inclusive) and a number of slots."""

    device: Device
    kernels: DeviceKernels
    layers: range
    slots: int
    lend: bool = False
    """Whether long passes borrow slots for their outputs."""


class _Desk:
    """Where the ids of a layer arrive on the host, and behind them what later routers chose that were applied early."""

    def __init__(self, tier: VramTier, positions: int, top_k: int, prefetch_depth: int) -> None:
        self.tier = tier
        self.ids = tier.device.pinned((positions,), torch.int64)
        self._arrived: Event | None = None
        # Two: the host may be a layer ahead of the device.
        self._early = [tier.device.pinned((prefetch_depth, top_k), torch.int64) for _ in range(2)]
        self._coming: deque[tuple[Event, Sequence[int], Tensor]] = deque(maxlen=2)

    def send(self, ids: Tensor) -> None:
        """Queue the way of ids [T, K] to the host."""
        stream = self.tier.device.compute
        stream.copy(self.ids[: ids.numel()], ids.reshape(-1))
        self._arrived = stream.record()

    def send_early(self, layers: Sequence[int], ids: Tensor) -> None:
        """Queue the way of ids [len(layers), K], which later routers chose early, to the host."""
        self._early.reverse()
        there, stream = self._early[0][: len(layers)], self.tier.device.compute
        stream.copy(there, ids)
        self._coming.append((stream.record(), layers, there))

    def early(self) -> Iterator[tuple[int, list[int]]]:
        """(layer, experts) of what was sent early and has arrived."""
        while self._coming and self._coming[0][0].done():
            _, layers, ids = self._coming.popleft()
            yield from zip(layers, ids.tolist(), strict=True)

    def forget_early(self) -> None:
        """A new step, or one that broke off: what is still under way is of no use."""
        self._coming.clear()

    def receive(self, shape: Sequence[int]) -> Routing:
        """Wait for what was sent last, of this shape [T, K]."""
        assert self._arrived is not None
        self._arrived.wait()
        return self.ids[: shape[0] * shape[1]].view(*shape).tolist()


class DeviceExecutor:
    """Computes the routed experts of a store on the devices of `shares`.

    Call `begin_step` with the token ids of each forward pass before it; the model then calls the executor
    once per MoE layer, in order, with tensors on that layer's device. All memory is taken here, at load.
    """

    def __init__(
        self,
        store: ExpertStore,
        shares: Sequence[DeviceShare],
        *,
        max_tokens: int = 1,
        prefetch: bool = True,
        prefetch_depth: int = EARLY_ROUTERS,
        below: Kernels | None = None,
        **ram: Any,
    ) -> None:
        """`max_tokens`: the largest forward pass for which memory is set aside. `below`: with these kernels the
        processor computes a part of the missing experts; results then depend on which, by rounding.
        `prefetch_depth`: see LookAhead. `ram`: options of RamTier."""
        self.ram = RamTier(store, prefetch=prefetch, prefetch_depth=prefetch_depth, **ram)
        self._prefetch_depth = prefetch_depth
        self._max_tokens = max_tokens
        self._recording = bool(ram.get("record"))
        first, self._top_k = self.ram.layers[0], self.ram.shape.top_k
        self.tiers: list[VramTier] = []
        self._desks: list[_Desk] = []  # per MoE layer
        self.kernels = [share.kernels for share in shares for _ in share.layers]
        for share in shares:
            with share.device.guard():
                note = share.device.page_lock(self.ram.pool.bytes, self.ram.pool.stride)
                if note is not None:
                    self.ram.telemetry.note(f"copies to {share.device.name} are slow: {note}")
                tier = VramTier(
                    share.device,
                    share.kernels,
                    self.ram,
                    store.layout,
                    layers=range(share.layers.start - first, share.layers.stop - first),
                    slots=share.slots,
                    max_tokens=max_tokens,
                    lend=share.lend,
                    prefetch=prefetch,
                    prefetch_depth=prefetch_depth,
                    below=below,
                )
                desk = _Desk(tier, max_tokens * self._top_k, self._top_k, prefetch_depth)
            self.tiers.append(tier)
            self._desks += [desk] * len(share.layers)
        assert len(self._desks) == self.ram.shape.layers, "every layer has one device"
        self._each_desk = list(dict.fromkeys(self._desks))
        self._resident = False
        self._hinted: int | None = None
        self._unbooked: int | None = None
        """A layer of which everything is queued, and whose books are still to be kept."""

    # -- the model's side --------------------------------------------------------------------

    def begin_session(self) -> None:
        """The next step begins a new conversation."""
        self.ram.begin_session()

    def begin_step(self, tokens: Sequence[int], upcoming: Sequence[int] = ()) -> None:
        """A forward pass over `tokens` begins; `upcoming` are tokens already known to follow them."""
        assert len(tokens) <= self._max_tokens, "a forward pass is as long as what was set aside for it"
        self._hinted = self._unbooked = None
        for desk in self._each_desk:
            desk.forget_early()
        for tier in self.tiers:
            with tier.device.guard():
                tier.settle()
        before, resident = self._resident, all(tier.complete and not tier.lends(len(tokens)) for tier in self.tiers)
        self._resident = resident and not self._recording
        if self._resident:  # nothing is decided, so there is nothing to learn
            if not before:
                for tier in self.tiers:
                    tier.hide()
            return
        if before:  # while everything was there nothing held its slot
            for tier in self.tiers:
                with tier.device.guard():
                    tier.device.compute.record().wait()
        changed = self.ram.begin_step(tokens, upcoming)
        for tier in self.tiers:
            with tier.device.guard():
                tier.begin_step(tokens, changed)

    def preference(self, layer: int, ids: Tensor) -> Tensor | None:
        """The lead of every expert of `layer` that needs no read, float32 [E]; None to keep the choice ids [T, K].

        Only with the option `prefer_resident`, which costs a wait for the ids.
        """
        if self.ram.preference is None or self._resident:
            return None
        index = layer - self.ram.layers[0]
        desk = self._desks[index]
        with desk.tier.device.guard():
            desk.send(ids)
            lead = self.ram.preference.of(index, desk.receive(ids.shape))
            return None if lead is None else torch.from_numpy(lead).to(ids.device)

    def hint(self, layer: int, ids: Tensor, weights: Tensor) -> None:
        """`layer` will be called with these ids [T, K]: send them to the host while the shared expert is computed."""
        index = layer - self.ram.layers[0]
        self._hinted = index
        if self._resident:
            return
        desk = self._desks[index]
        with desk.tier.device.guard():
            desk.send(ids)

    def __call__(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [T, H], ids [T, K], weights [T, K], all on the layer's device -> [T, H].

        Raises DiskError if an expert cannot be read; the executor stays usable. Raises DeviceError if the
        device fails; it does not.
        """
        index = layer - self.ram.layers[0]
        if self._hinted != index:
            self.hint(layer, ids, weights)
        desk = self._desks[index]
        device, partial = desk.tier.device, desk.tier.partial(ids.numel())
        try:
            with device.guard():
                if self._resident:
                    desk.tier.serve_resident(LayerJob(index, x, _NO_IDS, partial), ids)
                else:
                    self._serve(index, desk, x, partial, ids.shape)
                out = device.call(lambda: self.kernels[index].combine(partial, ids, weights))
                if not self._resident:  # the device has what it needs: now whatever it does not wait for
                    self._keep_books(index)
                return out
        except BaseException:
            self.abandon()
            raise

    # -- the model's side, one token ---------------------------------------------------------

    def present(self, layer: int, x: Tensor, ids: Tensor) -> None:
        """See `DeviceExperts`. Touches nothing but tensors that stay where they are."""
        index = layer - self.ram.layers[0]
        tier = self._desks[index].tier
        tier.present(index, x, ids, tier.partial(ids.numel()))

    def combined(self, layer: int, ids: Tensor, weights: Tensor) -> Tensor:
        """See `DeviceExperts`. Touches nothing but tensors that stay where they are."""
        index = layer - self.ram.layers[0]
        return self.kernels[index].combine(self._desks[index].tier.partial(ids.numel()), ids, weights)

    def send(self, layer: int, ids: Tensor) -> None:
        """See `DeviceExperts`. The device is busy with attention meanwhile: the time to keep books."""
        index = layer - self.ram.layers[0]
        desk = self._desks[index]
        try:
            with desk.tier.device.guard():
                if not self._resident:
                    desk.send(ids)
                    if self._unbooked is not None:
                        self._keep_books(self._unbooked)
                    desk.tier.settle()
                desk.tier.show(index)
        except BaseException:
            self.abandon()
            raise

    def complete(self, layer: int, x: Tensor) -> None:
        """See `DeviceExperts`. Raises as the call does."""
        index, k = layer - self.ram.layers[0], self._top_k
        tier = self._desks[index].tier
        if self._resident:
            tier.residency.events.hits += k
            return
        try:
            with tier.device.guard():
                desk, before = self._desks[index], tier.residency.events.misses
                wanted = self.ram.begin_layer(index, desk.receive((1, k)))
                job = LayerJob(index, x, desk.ids[:k].numpy(), tier.partial(k), present=True)
                tier.serve(job, wanted)
                self._unbooked = index
                # While experts come the device has enough to do; else its next layer comes first.
                if tier.residency.events.misses > before or index + 1 == len(self._desks):
                    self._keep_books(index)
        except BaseException:
            self.abandon()
            raise

    def lookahead(self) -> int:
        """None: ids of routers applied early come by `foresee`; to `expect` them they would have to be waited for."""
        return 0

    @property
    def early_routers(self) -> int:
        """How many later routers may ever be worth applying after a layer; 0 if every expert stays on the device."""
        return self._prefetch_depth if any(tier.foreseeing for tier in self.tiers) else 0

    def foresight(self) -> int:
        """How many of them are worth it in the step under way: where RAM or VRAM lacks experts and reads ahead pay."""
        if self._resident:
            return 0
        return max(self.ram.lookahead(), *(tier.lookahead() for tier in self.tiers))

    def foresee(self, layers: Sequence[int], ids: Tensor) -> None:
        """The routers of `layers`, applied early, choose ids [len(layers), K] on the device, best first."""
        desk = self._desks[layers[0] - self.ram.layers[0]]
        with desk.tier.device.guard():
            desk.send_early(layers, ids)

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        """A router applied early chose `experts` (best first) for `layer`: bring them nearer if links idle."""
        index = layer - self.ram.layers[0]
        self.ram.expect(index, experts)
        self._desks[index].tier.expect(index, experts)

    # -- around a run ------------------------------------------------------------------------

    def warm(self, trace: Trace) -> int:
        """Learn from `trace` and read its most used experts into RAM; see RamTier."""
        count = self.ram.warm(trace)
        for tier in self.tiers:
            tier.residency.refresh()
        return count

    def rehearsal(self) -> RehearsedExperts:
        """What stands for the experts while the kernels around them are made ready; before anything is resident."""
        return RehearsedExperts([desk.tier for desk in self._desks], self.kernels, self.ram.layers[0])

    def preload(self) -> None:
        """Fill tiers that have room for all of their experts."""
        for tier in self.tiers:
            if tier.residency.slots == len(tier.layers) * self.ram.shape.experts:
                with tier.device.guard():
                    tier.preload()

    def counters(self) -> Telemetry:
        """The telemetry, brought up to date."""
        telemetry = self.ram.counters()
        telemetry.vram = sum((tier.counters() for tier in self.tiers), TierCounters())
        telemetry.computed_in_ram = sum(tier.computed_below for tier in self.tiers)
        return telemetry

    def trace(self) -> Trace:
        """The recorded routing. Its events are those of RAM below VRAM, which a replay without VRAM does not repeat."""
        return self.ram.trace()

    def close(self) -> None:
        """Stop the readers and keep what was learned. Harmless when repeated."""
        self.ram.close()
        for tier in self.tiers:
            tier.device.close()

    # -- inside ------------------------------------------------------------------------------

    def _serve(self, index: int, desk: _Desk, x: Tensor, partial: Tensor, shape: Sequence[int]) -> None:
        desk.tier.settle()
        wanted = self.ram.begin_layer(index, desk.receive(shape))
        desk.tier.serve(LayerJob(index, x, desk.ids[: partial.shape[0]].numpy(), partial), wanted)

    def _keep_books(self, index: int) -> None:
        """All of layer `index` is queued: what nobody waits for, speculation above all."""
        desk, self._unbooked = self._desks[index], None
        for layer, experts in desk.early():
            if layer - self.ram.layers[0] > index:
                self.expect(layer, experts)
        with desk.tier.device.guard():
            desk.tier.end_layer(index)
        self.ram.end_layer()

    def abandon(self) -> None:
        """The forward pass broke off, wherever it was: wait for what is under way, so that the next one can begin."""
        self._hinted = self._unbooked = None
        for desk in self._each_desk:
            desk.forget_early()
        for tier in self.tiers:
            with tier.device.guard():
                tier.abandon()
        self.ram.abandon()


_NO_IDS = torch.empty(0, dtype=torch.int64).numpy()
