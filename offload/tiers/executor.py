"""Routed experts computed by the processor, in the RAM slots where their bytes lie.

Owns the order of computing. Satisfies the model's `RoutedExperts`. Must not decide what is kept, know the
architecture around the experts, or let any of this change the answer: every expert's output goes to its
own row of `partial`, and the rows are summed in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from offload.cache.decisions import Service
from offload.cache.policy import Routing
from offload.cache.trace import Trace
from offload.kernels import Kernels, OneToken, Residents
from offload.telemetry import Telemetry
from offload.tiers.ram import RamTier
from offload.tiers.slot_reads import ExpertStore


class Executor:
    """Computes the routed experts of a store that a RAM tier pages.

    Call `begin_step` with the token ids of each forward pass before it; the model then calls the
    executor once per MoE layer, in order. All memory is taken here, at load.
    """

    def __init__(self, store: ExpertStore, kernels: Kernels, *, max_tokens: int = 1, **tier: Any) -> None:
        """`max_tokens`: the largest forward pass for which memory is set aside. `tier`: options of RamTier."""
        self.ram = RamTier(store, followed=False, **tier)
        self._kernels = kernels
        self._first = self.ram.layers[0]
        self._residents = self.ram.residents()
        top_k = self.ram.shape.top_k
        self._partial = torch.zeros(max_tokens * top_k, store.config.hidden_size)
        self._single = list(torch.arange(top_k).view(-1, 1))
        self._open: tuple[_LayerJob, Service] | None = None

    # -- the model's side --------------------------------------------------------------------

    def begin_session(self) -> None:
        """The next step begins a new conversation."""
        self.ram.begin_session()

    def begin_step(self, tokens: Sequence[int], upcoming: Sequence[int] = ()) -> None:
        """A forward pass over `tokens` begins; `upcoming` are tokens already known to follow them."""
        if self._open is not None:  # the last step broke off between a hint and its call
            self.abandon()
        self.ram.begin_step(tokens, upcoming)

    def preference(self, layer: int, ids: Tensor) -> Tensor | None:
        """The lead of every expert of `layer` that needs no read, float32 [E]; None to keep the choice ids [T, K].

        Only with the option `prefer_resident`. The routing then depends on what is resident.
        """
        if self.ram.preference is None:
            return None
        lead = self.ram.preference.of(layer - self._first, ids.tolist())
        return None if lead is None else torch.from_numpy(lead)

    def hint(self, layer: int, ids: Tensor, weights: Tensor) -> None:
        """`layer` will be called with these ids [T, K]: decide now and begin to read what is missing."""
        index, routing = layer - self._first, ids.tolist()
        self._begin(index, ids, routing, self.ram.begin_layer(index, routing))

    def _begin(self, index: int, ids: Tensor, routing: Routing, wanted: list[int]) -> None:
        self._open = _LayerJob(self, ids, routing), self.ram.open(index, wanted)

    def __call__(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [T, H], ids [T, K], weights [T, K] -> [T, H]; `layer` is the decoder layer's index.

        Raises DiskError if an expert cannot be read; the executor stays usable.
        """
        if self._open is None:
            self.hint(layer, ids, weights)
        assert self._open is not None
        (job, demand), self._open = self._open, None
        assert demand.layer == layer - self._first, "a hint is followed by the call it announces"
        job.x = x
        self.ram.complete(demand, job.compute)
        self.ram.end_layer()
        return self._kernels.combine(job.partial, ids, weights)

    def residents(self) -> Residents | None:
        """Where experts are that need no read; None where a preference for them changes the routing."""
        return None if self.ram.preference else self._residents

    def ran(self, token: OneToken, before: int) -> None:
        """The layers before `before` that were not reported have run for `token` without a call."""
        for index in range(self.ram.next_layer, before - self._first):
            self.ram.ran(index, [token.chosen(index + self._first)])

    def finish(self, layer: int, token: OneToken) -> None:
        """A whole MoE block of one token from the router's choice on."""
        self.ran(token, layer)
        index, routing = layer - self._first, [token.chosen(layer)]
        wanted = self.ram.begin_layer(index, routing)
        # Reads ahead have been settled; and where residents are preferred, nothing has been looked up yet.
        if token.run(layer, layer + 1, self._residents, routed=True) > layer:
            self.ram.residency.used(index, wanted)
            self.ram.end_layer()
            return
        ids = token.ids(layer)
        self._begin(index, ids, routing, wanted)
        token.end(layer, self(layer, token.x, ids, token.weights))

    def end_step(self, token: OneToken) -> None:
        """The last layer has run: what waits for the end of the step is done while the head is computed."""
        self.ran(token, self._first + self.ram.shape.layers)
        self.ram.end_step()

    def lookahead(self) -> int:
        """For how many layers ahead routers applied early are of use in this step."""
        return self.ram.lookahead()

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        """A router applied early chose `experts` (best first) for `layer`: read them if the drive idles."""
        self.ram.expect(layer - self._first, experts)

    def abandon(self) -> None:
        """The forward pass broke off, wherever it was: drop its reads, so that the next one can begin."""
        self._open = None
        self.ram.abandon()

    # -- around a run ------------------------------------------------------------------------

    def counters(self) -> Telemetry:
        """The telemetry, brought up to date."""
        return self.ram.counters()

    def trace(self) -> Trace:
        """The recorded routing, with the settings and events that a replay must reproduce."""
        return self.ram.trace()

    def close(self) -> None:
        """Stop the readers and keep what was learned. Harmless when repeated."""
        self.ram.close()


class _LayerJob:
    """One layer of one forward pass."""

    def __init__(self, executor: Executor, ids: Tensor, routing: Routing) -> None:
        self._executor = executor
        self.x: Tensor | None = None  # [T, H], known when the layer is called
        self._k = ids.shape[1]
        count = ids.numel()
        own = executor._partial
        self.partial = own[:count] if count <= own.shape[0] else torch.empty(count, own.shape[1])
        self._positions = positions(ids, routing, executor._single)

    def compute(self, experts: Sequence[tuple[int, int]]) -> None:
        """Outputs of (expert, slot) pairs, each into its rows of `partial`."""
        assert self.x is not None
        weights = self._executor.ram.weights
        wave = [(weights(slot), self._positions[expert]) for expert, slot in experts]
        self._executor._kernels.experts(self.x, wave, self._k, self.partial)


def positions(ids: Tensor, routing: Routing, single: Sequence[Tensor]) -> dict[int, Tensor]:
    """Where each expert's outputs go: positions t * K + j, ascending. `single[j]` is the tensor [j]."""
    if len(routing) == 1:
        return dict(zip(routing[0], single, strict=True))
    flat = ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    experts, counts = torch.unique_consecutive(flat[order], return_counts=True)
    return dict(zip(experts.tolist(), torch.split(order, counts.tolist()), strict=True))
