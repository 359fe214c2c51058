"""The VRAM tier: routed experts in slots of device memory, copied from the slots of the RAM tier below.

Owns what a layer of a forward pass comes to on one device: which missing experts the processor computes, which are
paged (`waves`), what may be copied ahead (`promotions`), or that everything is there. The same residency and the
same policy as below decide what is kept. Every slot that a queued copy or kernel needs, here or in RAM, is held
until an event says that it is over; only then may it become a victim. Must not know files, nor the architecture
around the experts.

The device must not wait for the host: what it can begin with is queued first, in the order in which the link and
then the kernels need it. What only keeps books is done while the device works (`settle`, before the ids of a layer
are awaited, and `end_layer`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import numpy as np
from torch import Tensor

from offload.cache.lookahead import EARLY_ROUTERS, LookAhead
from offload.cache.residency import Residency
from offload.cache.split import SplitModel
from offload.errors import DeviceError
from offload.kernels import Kernels
from offload.kernels.device import DeviceKernels
from offload.store.layout import ExpertLayout
from offload.telemetry import TierCounters
from offload.tiers.device import Device
from offload.tiers.in_place import MOST_TOKENS, InPlace
from offload.tiers.launches import LayerJob, SlotLaunches
from offload.tiers.link import Link
from offload.tiers.promotions import Promotions
from offload.tiers.ram import RamTier
from offload.tiers.staging import SlotTable
from offload.tiers.vram_memory import VramMemory
from offload.tiers.waves import Waves


class VramTier:
    """`slots` experts of the MoE layers `layers` (counted from 0) on one device.

    For every layer: `serve`. All memory is taken here, at load; the device's calls are made within its guard.
    """

    def __init__(
        self,
        device: Device,
        kernels: DeviceKernels,
        ram: RamTier,
        layout: ExpertLayout,
        *,
        layers: range,
        slots: int,
        max_tokens: int,
        lend: bool = False,
        prefetch: bool = True,
        prefetch_depth: int = EARLY_ROUTERS,
        below: Kernels | None = None,
    ) -> None:
        """`lend`: see VramMemory. `prefetch_depth`: see LookAhead.
        `below`: kernels with which the processor may compute missing experts in RAM; without them all are copied."""
        shape, policy = ram.shape, ram.residency.policy
        self.device = device
        self.layers = layers
        self._kernels = kernels
        self._ram = ram
        slots = min(slots, len(layers) * shape.experts)
        # Two waves may be open: the RAM below must be able to hold what both of them copy.
        width = max(1, min(16, ram.residency.slots // 4))
        self.residency = Residency(policy, slots, floor=shape.top_k, width=width, leads=False)
        self._memory = VramMemory(device, layout, slots, max_tokens=max_tokens, top_k=shape.top_k, lend=lend)
        self.slab = self._memory.slab
        self.split = SplitModel(layout.stride)
        timed = self.split if below is not None else None
        self._link = Link(device, ram, self._memory.targets, timed)
        lookahead = LookAhead(policy, prefetch_depth=prefetch_depth) if prefetch else None
        self._promotions = Promotions(self._link, self.residency, ram.residency, layers, lookahead)
        self._launches = SlotLaunches(device, kernels, self.slab, max_tokens, shape.top_k, shape.experts)
        self._table = SlotTable(device, shape.layers, shape.experts)
        self._shown: set[int] = set()
        """Layers whose row of the table is as the slots are."""
        self._decoding = False
        self._in_place: InPlace | None = None
        if below is not None:
            self._in_place = InPlace(device, below, ram, layout.hidden_size, self.split)
        self._waves = Waves(device, ram, self.residency, self._link, self._promotions, self._launches, timed)

    # -- a forward pass ----------------------------------------------------------------------

    def begin_step(self, tokens: Sequence[int], changed: bool) -> None:
        """A forward pass begins; `changed`: the policy's values have."""
        if changed:
            self.residency.refresh()
        self._decoding = len(tokens) == 1
        self.hide()
        if self._memory.borrowed != self.lends(len(tokens)):
            self._give_back_slots() if self._memory.borrowed else self._borrow_slots()
        self._promotions.begin_step(tokens)
        self._promotions.sweep(self.layers.start)

    def partial(self, positions: int) -> Tensor:
        """Where the outputs of a layer of this pass go, float32 [positions, H]."""
        return self._memory.outputs(positions)

    def serve(self, job: LayerJob, wanted: list[int]) -> None:
        """Queue the outputs of the experts `wanted` (ascending, all of `job.flat`) for every position.

        `settle` comes before it, `end_layer` after it.
        """
        side, below = self._in_place, self._computed_below(job, wanted)
        # Opened even when it is empty: what the router chose counts for RAM, too.
        demand = self._ram.open(job.layer, below)
        if side is not None and below:
            side.begin(job.x)
            wanted = [expert for expert in wanted if expert not in below]
        self._waves.serve(job, wanted)
        if side is not None and below:
            self._ram.complete(demand, lambda there: side.compute(there, job.flat, job.partial))

    def end_layer(self, layer: int) -> None:
        """Everything that the device can do for `layer` is queued: use the link for later ones, if it idles."""
        if self._decoding:
            self._promotions.promote(layer + 1)
        else:
            self._promotions.sweep(layer + 1)

    @property
    def foreseeing(self) -> bool:
        """Whether it may ever be of use to know early what layers will need."""
        missing = self.residency.slots < len(self.layers) * self._ram.shape.experts
        return self._promotions.lookahead is not None and missing

    def lookahead(self) -> int:
        """For how many layers ahead `expect` is of use now, as `RamTier.lookahead` has it."""
        lookahead = self._promotions.lookahead
        return lookahead.early_routers if lookahead is not None and self.foreseeing else 0

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        """A router applied early chose `experts` (best first) for `layer`."""
        self._promotions.expect(layer, experts)

    def settle(self) -> None:
        """Let go of everything that earlier layers queued, and admit what has been promoted.

        The ids of a layer come from the device behind all work of the layers before it, so this waits for nothing
        that they would not wait for; called before they are awaited, it is done while the device is busy.
        """
        self._waves.settle()
        self._promotions.admit_arrived()

    # -- everything resident -----------------------------------------------------------------

    def lends(self, tokens: int) -> bool:
        """Whether a pass over so many tokens has its outputs where slots are otherwise."""
        return self._memory.lends(tokens)

    @property
    def complete(self) -> bool:
        """Whether every expert of every layer is in a slot, so that nothing is left to decide."""
        full = self.residency.resident == len(self.layers) * self._ram.shape.experts
        return full and not self._promotions.pending and not self._waves.pending

    def preload(self) -> None:
        """Bring in every expert, layer by layer, outside of any forward pass."""
        for layer in self.layers:
            self.load(layer, list(range(self._ram.shape.experts)))
        for layer in self.layers:
            self.show(layer)

    def load(self, layer: int, experts: list[int]) -> None:
        """Bring `experts` of one layer into slots without computing."""
        nothing = self.partial(0)
        self.hide()
        self._waves.serve(LayerJob(layer, nothing, np.empty(0, np.int64), nothing), experts)
        self.settle()

    def serve_resident(self, job: LayerJob, ids: Tensor) -> None:
        """`serve` when the tier is `complete`: slots are looked up on the device, the host knows no ids."""
        self.show(job.layer)
        work = partial(self.present, job.layer, job.x, ids, job.partial)
        self.device.compute.launch(work, reads=[self.slab.data], writes=[job.partial])
        self.residency.events.hits += ids.numel()

    def rehearse(self, layer: int, x: Tensor, ids: Tensor) -> Tensor:
        """Queue the kernels of a pass over x [T, H] with ids [T, K] as if their experts were there: outputs that mean
        nothing, [T * K, H]. Only while no expert is: outputs may lie in any slot."""
        assert not self.residency.resident, "a rehearsal comes before experts do"
        self._memory.borrowed = self.lends(x.shape[0])
        job = LayerJob(layer, x, ids.reshape(-1).cpu().numpy(), self.partial(ids.numel()))
        usable = self.residency.slots - (len(self._memory.lendable) if self._memory.borrowed else 0)
        if usable == len(self.layers) * self._ram.shape.experts:
            work = partial(self.present, layer, x, ids, job.partial)
            self.device.compute.launch(work, reads=[self.slab.data], writes=[job.partial])
        else:
            pairs = [(expert, number % usable) for number, expert in enumerate(np.unique(job.flat).tolist())]
            self._launches.announce(job, [pairs])
            self._launches.launch(job, pairs)
            self._launches.end()
        self._memory.borrowed = False
        return job.partial

    # -- looked up on the device -------------------------------------------------------------

    def show(self, layer: int) -> None:
        """Let the device's table say where the experts of `layer` are.

        From now until the ids of that layer are known, none of them may lose its slot.
        """
        if layer not in self._shown:
            self._table.show(layer, self.residency.there[layer])
            self._shown.add(layer)

    def hide(self) -> None:
        """Slots have changed since layers were shown."""
        self._shown.clear()

    def present(self, layer: int, x: Tensor, ids: Tensor, outputs: Tensor) -> None:
        """Compute what the table has of ids [T, K] into their rows of `outputs`. To be queued or recorded."""
        slots = self._table.row(layer).index_select(0, ids.reshape(-1))
        self._kernels.slot_experts(self.slab, x, slots, outputs)

    # -- around a run ------------------------------------------------------------------------

    def counters(self) -> TierCounters:
        """Hits, misses and copies. `bytes_read` and `read_s` are those of the copies."""
        link = self._link
        return TierCounters(
            **vars(self.residency.events), reads=link.copies, bytes_read=link.nbytes, read_s=link.busy_s
        )

    @property
    def computed_below(self) -> int:
        """Experts that the processor has computed in RAM."""
        return self._in_place.experts if self._in_place else 0

    def abandon(self) -> None:
        """A step broke off: wait for the device, then forget what was under way. RAM is to be abandoned as well."""
        with suppress(DeviceError):
            self.device.synchronize()
        if self._memory.borrowed:
            self._memory.borrowed = False
            self.residency.give_back()
        self._waves.abandon()
        self._promotions.abandon()
        self._table.abandon()
        self.hide()
        self.residency.abandon()

    def _computed_below(self, job: LayerJob, wanted: list[int]) -> list[int]:
        """Those of `wanted` that the processor computes: the least valuable ones, as what is copied stays."""
        tokens = job.x.shape[0]
        if self._in_place is None or tokens > MOST_TOKENS:
            return []
        missing = [expert for expert in wanted if self.residency.slot(job.layer, expert) < 0]
        count = self.split.divide(len(wanted) - len(missing), len(missing), rows=tokens).in_place
        count = min(count, self._ram.residency.slots // 4)  # they keep their slots until all copies are queued
        values = self.residency.policy.values[job.layer]
        return sorted(sorted(missing, key=lambda expert: (float(values[expert]), expert))[:count])

    def _borrow_slots(self) -> None:
        """Long pass ahead: the last slots of the slab hold its outputs instead of experts."""
        self._promotions.admit_all()
        self._memory.borrowed = True
        self.residency.lend(self._memory.lendable)

    def _give_back_slots(self) -> None:
        """Long passes are over: experts may be copied there again, once the last sum has been read."""
        self.device.compute.record().wait()
        self._memory.borrowed = False
        self.residency.give_back()
