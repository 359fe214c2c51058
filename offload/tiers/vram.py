"""The VRAM tier: routed experts in slots of device memory, copied from the slots of the RAM tier below.

Owns the slab of slots, the copies into it and the order between copies and kernels. The same residency and
the same policy as below decide what is kept. Every slot that a queued copy or kernel needs, here or in RAM,
is held until an event says that it is over; only then may it become a victim. Must not know files, nor the
architecture around the experts.

A wave is computed like this: experts whose bytes are in RAM are copied, on a stream of its own; kernels of
the hits are queued; every other expert is copied as soon as its bytes are in RAM, and its kernel is queued
behind its copy. The host waits for none of it, except for the wave before the last one.

The device must not wait for the host: what it can begin with is queued first, in the order in which the
link and then the kernels need it. What only keeps books is done while the device works (`settle`, before the
ids of a layer are awaited, and `end_layer`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offload.cache.decisions import Decision, Service
from offload.cache.lookahead import EARLY_ROUTERS, LookAhead
from offload.cache.residency import Residency
from offload.cache.split import SplitModel
from offload.errors import DeviceError
from offload.kernels import Kernels
from offload.kernels.device import DeviceKernels, ExpertSlab
from offload.store.layout import ExpertLayout
from offload.telemetry import TierCounters
from offload.tiers.device import Device, Event
from offload.tiers.in_place import MOST_TOKENS, InPlace
from offload.tiers.launches import LayerJob, SlotLaunches
from offload.tiers.ram import RamTier
from offload.types import align_up, ceil_div

ALIGNMENT = 256
"""Slots begin at multiples of it, so that every load of a warp is aligned."""

SHORT = 8
"""Longest pass whose outputs have memory of their own; longer ones may borrow slots for it."""

BATCH = 4
"""Experts per launch of a long pass at most, once their copies are queued: the rows of one do not fill a device."""

PROMOTIONS = 1
"""Experts copied on speculation at a time: a demand behind them waits no longer than that."""

PROMOTION_LAYERS = 2
"""How far ahead at least experts are copied on speculation."""

PROMOTION_MARGIN = 1.5
"""By how much an expert must be worth more than the one it displaces on speculation."""


@dataclass
class _Copy:
    """An expert on its way from a RAM slot, which is held until `end`."""

    begin: Event
    end: Event
    source: int


@dataclass
class _Wave:
    """Slots that queued kernels read, held until `used`."""

    slots: list[int]
    used: Event
    hits: tuple[Event, Event, int] | None
    """Begin and end of the kernels of this many experts that needed no copy, where that is of interest."""


@dataclass
class _Promotion:
    layer: int
    copy: _Copy


@dataclass
class LinkCounters:
    """What the copies of experts did."""

    copies: int = 0
    nbytes: int = 0
    busy_s: float = 0.0


def slot_nbytes(layout: ExpertLayout) -> int:
    """Device memory of one slot."""
    return align_up(layout.stride, ALIGNMENT)


def lent_slots(layout: ExpertLayout, max_tokens: int, top_k: int) -> int:
    """Slots that hold the outputs of a pass over `max_tokens` tokens."""
    return ceil_div(max_tokens * top_k * layout.hidden_size * torch.float32.itemsize, slot_nbytes(layout))


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
        """`lend`: passes of more than SHORT tokens borrow slots for their outputs, so that decoding has more of them.
        `prefetch_depth`: see LookAhead.
        `below`: kernels with which the processor may compute missing experts in RAM; without them all are copied."""
        shape = ram.shape
        self.device = device
        self.layers = layers
        self._kernels = kernels
        self._ram = ram
        self._stride = layout.stride
        slots = min(slots, len(layers) * shape.experts)
        # Two waves may be open: the RAM below must be able to hold what both of them copy.
        width = max(1, min(16, ram.residency.slots // 4))
        self.residency = Residency(ram.residency.policy, slots, floor=shape.top_k, width=width, leads=False)
        self.slab = ExpertSlab(layout, device.empty((slots, slot_nbytes(layout)), torch.uint8))
        self._targets = self.slab.data[:, : self._stride].unbind()
        own = (SHORT if lend else max_tokens) * shape.top_k
        self._own = device.empty((own, layout.hidden_size), torch.float32)
        lent = lent_slots(layout, max_tokens, shape.top_k) if lend else 0
        assert lent + 2 <= self.residency.slots, "enough slots to work with are left"
        self._lendable = range(slots - lent, slots)
        self._borrowed = False
        self.link = LinkCounters()
        self._launches = SlotLaunches(device, kernels, self.slab, max_tokens, shape.top_k, shape.experts)
        self._table = device.empty((shape.layers, shape.experts), torch.int32)
        self._table_valid = False
        self._lookahead = LookAhead(ram.residency.policy, prefetch_depth=prefetch_depth) if prefetch else None
        self._job: LayerJob | None = None
        self._open: deque[tuple[Decision, Service | None]] = deque()
        self._sources: deque[_Copy] = deque()
        self._waves: deque[_Wave] = deque()
        self._promotions: dict[int, _Promotion] = {}  # by slot
        self._decoding = False
        ram.on_stuck(self._give_back)
        self.split = SplitModel(self._stride)
        self._in_place: InPlace | None = None
        if below is not None:
            self._in_place = InPlace(device, below, ram, layout.hidden_size, self.split)

    # -- a forward pass ----------------------------------------------------------------------

    def begin_step(self, tokens: Sequence[int], changed: bool) -> None:
        """A forward pass begins; `changed`: the policy's values have."""
        if changed:
            self.residency.refresh()
        self._decoding = len(tokens) == 1
        if self._borrowed != self.lends(len(tokens)):
            self._give_back_slots() if self._borrowed else self._borrow_slots()
        if self._lookahead:
            self._lookahead.begin_step(tokens)

    def partial(self, positions: int) -> Tensor:
        """Where the outputs of a layer of this pass go, [positions, H]."""
        if not self._borrowed:
            return self._own[:positions]
        room = self.slab.data[self._lendable.start :].view(-1).view(torch.float32)
        hidden = self._own.shape[1]
        return room[: positions * hidden].view(positions, hidden)

    def serve(self, job: LayerJob, wanted: list[int]) -> None:
        """Queue the outputs of the experts `wanted` (ascending, all of `job.flat`) for every position.

        `settle` comes before it, `end_layer` after it.
        """
        self._job = job
        side, below = self._in_place, self._computed_below(job, wanted)
        # Opened even when it is empty: what the router chose counts for RAM, too.
        demand = self._ram.open(job.layer, below)
        if side is not None and below:
            side.begin(job.x)
            wanted = [expert for expert in wanted if expert not in below]
        self.residency.complete(
            self.residency.open(job.layer, wanted, self._start), self._start, self._finish, self._stuck
        )
        if side is not None and below:
            self._ram.complete(demand, lambda there: side.compute(there, job.flat, job.partial))
        self._job = None

    def end_layer(self, layer: int) -> None:
        """Everything that the device can do for `layer` is queued: use the link for later ones, if it idles."""
        if self._decoding:
            self._promote(layer + 1)

    @property
    def foreseeing(self) -> bool:
        """Whether it may ever be of use to know early what layers will need."""
        return self._lookahead is not None and self.residency.slots < len(self.layers) * self._ram.shape.experts

    def lookahead(self) -> int:
        """For how many layers ahead `expect` is of use now, as `RamTier.lookahead` has it."""
        return self._lookahead.early_routers if self._lookahead is not None and self.foreseeing else 0

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        """A router applied early chose `experts` (best first) for `layer`."""
        if self._lookahead:
            self._lookahead.expect(layer, experts)

    def settle(self) -> None:
        """Let go of everything that earlier layers queued, and admit what has been promoted.

        The ids of a layer come from the device behind all work of the layers before it, so this waits for nothing
        that they would not wait for; called before they are awaited, it is done while the device is busy.
        """
        while self._waves:
            self._retire()
        while self._sources:
            self._release_source()
        for slot in [slot for slot, promotion in self._promotions.items() if promotion.copy.end.done()]:
            self._admit(slot)
        events, lookahead = self.residency.events, self._lookahead
        if lookahead is not None:
            lookahead.outcome(events.prefetch_useful + events.prefetch_late, events.prefetch_wasted)

    # -- everything resident -----------------------------------------------------------------

    def lends(self, tokens: int) -> bool:
        """Whether a pass over so many tokens has its outputs where slots are otherwise."""
        return bool(self._lendable) and tokens > SHORT

    @property
    def complete(self) -> bool:
        """Whether every expert of every layer is in a slot, so that nothing is left to decide."""
        full = self.residency.resident == len(self.layers) * self._ram.shape.experts
        return full and not self._promotions and not self._waves

    def preload(self) -> None:
        """Bring in every expert, layer by layer, outside of any forward pass."""
        for layer in self.layers:
            self.load(layer, list(range(self._ram.shape.experts)))

    def load(self, layer: int, experts: list[int]) -> None:
        """Bring `experts` of one layer into slots without computing."""
        self._job = LayerJob(layer, self._own[:0], np.empty(0, np.int64), self._own[:0])
        self.residency.complete(
            self.residency.open(layer, experts, self._start), self._start, self._finish, self._stuck
        )
        self._job = None
        self.settle()

    def serve_resident(self, job: LayerJob, ids: Tensor) -> None:
        """`serve` when the tier is `complete`: slots are looked up on the device, the host knows no ids."""
        if not self._table_valid:
            rows = torch.tensor(self.residency.table(), dtype=torch.int32)
            self.device.compute.launch(lambda: _assign(self._table, rows), writes=[self._table])
            self._table_valid = True
        row = self._table[job.layer]

        def work() -> None:
            slots = row.index_select(0, ids.reshape(-1))
            self._kernels.slot_experts(self.slab, job.x, slots, job.partial)

        self.device.compute.launch(work, reads=[self.slab.data, self._table], writes=[job.partial])
        self.residency.events.hits += ids.numel()

    # -- around a run ------------------------------------------------------------------------

    def counters(self) -> TierCounters:
        """Hits, misses and copies. `bytes_read` and `read_s` are those of the copies."""
        link = self.link
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
        if self._borrowed:
            self._borrowed = False
            self.residency.give_back()
        self._job = None
        self._open.clear()
        self._sources.clear()
        self._waves.clear()
        self._promotions.clear()
        self._launches.abandon()
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

    # -- waves -------------------------------------------------------------------------------

    def _start(self, decision: Decision) -> None:
        experts = [load.expert for load in decision.loads]
        self._open.append((decision, self._ram.open(decision.layer, experts) if experts else None))
        self._table_valid = False

    def _finish(self, decision: Decision) -> None:
        expected, demand = self._open.popleft()
        assert expected is decision, "waves are finished in the order in which they were started"
        wave = _Work(self, decision)
        if demand is None or not demand.held.hits:
            wave.resident()  # the first expert from RAM may take a while
        if demand is not None:
            self._ram.complete(demand, wave.arrived)
        held = decision.slots
        for slot in held:
            self.residency.hold(slot)
        self._waves.append(_Wave(held, self._launches.end(), wave.hits))
        while len(self._waves) > 1:
            self._retire()

    def _copy_in(self, there: Sequence[tuple[int, int]], slots: dict[int, int]) -> list[_Copy]:
        """Copy experts from their RAM slots, one behind the other."""
        copies, begin = [], None
        for expert, source in there:
            copy = self._copy(source, slots[expert], begin)
            self._sources.append(copy)
            copies.append(copy)
            begin = copy.end
        return copies

    def _copy(self, source: int, slot: int, begin: Event | None = None) -> _Copy:
        """`begin`: the end of a copy queued right before this one, if there is any."""
        copies = self.device.copies
        self._ram.residency.hold(source)
        begin = begin or copies.record(timed=True)
        copies.copy(self._targets[slot], self._ram.weights(source).buffer[: self._stride])
        return _Copy(begin, copies.record(timed=True), source)

    def _join(self, slot: int) -> None:
        """A promotion under way is demanded: the compute stream waits for it, the host does not."""
        copy = self._promotions[slot].copy
        self.device.compute.wait(copy.end)
        del self._promotions[slot]
        self._sources.append(copy)
        self.residency.loaded(slot)

    def _borrow_slots(self) -> None:
        """Long pass ahead: the last slots of the slab hold its outputs instead of experts."""
        for slot in list(self._promotions):
            self._promotions[slot].copy.end.wait()
            self._admit(slot)
        self._borrowed = True
        self.residency.lend(self._lendable)

    def _give_back_slots(self) -> None:
        """Long passes are over: experts may be copied there again, once the last sum has been read."""
        self.device.compute.record().wait()
        self._borrowed = False
        self.residency.give_back()

    def _retire(self) -> None:
        wave = self._waves.popleft()
        wave.used.wait()
        if wave.hits is not None:
            begun, ended, experts = wave.hits
            self.split.observed("kernel", ended.seconds_since(begun), experts)
        for slot in wave.slots:
            self.residency.let_go(slot)

    def _release_source(self) -> bool:
        """Wait for the oldest copy and give its RAM slot back; False if there is none."""
        if not self._sources:
            return False
        copy = self._sources.popleft()
        copy.end.wait()
        self._count(copy)
        self._ram.residency.let_go(copy.source)
        return True

    def _give_back(self) -> bool:
        with self.device.guard():  # it may be for another device that RAM needs the slot
            return self._release_source()

    def _stuck(self) -> None:
        if self._waves:
            self._retire()
        else:
            assert self._promotions, "every slot is taken and nothing is under way"
            slot = next(iter(self._promotions))
            self._promotions[slot].copy.end.wait()
            self._admit(slot)

    def _count(self, copy: _Copy) -> None:
        seconds = copy.end.seconds_since(copy.begin)
        self.link.copies += 1
        self.link.nbytes += self._stride
        self.link.busy_s += seconds
        self.split.observed("link", seconds)

    # -- promotion: copies nobody asked for, while the link idles ----------------------------------

    def _promote(self, following: int) -> None:
        """Copy an expert that later layers will probably need, or that is worth more than one here."""
        lookahead = self._lookahead
        if lookahead is None or len(self._promotions) >= PROMOTIONS:
            return
        while self._sources and self._sources[0].end.done():
            self._release_source()
        if self._sources:
            return
        reach = max(PROMOTION_LAYERS, lookahead.prefetch_depth)
        for layer in range(following, min(following + reach, self.layers.stop)):
            for expert in lookahead.candidates(layer):
                if self._copy_early(layer, expert, worth=0.5):
                    return
        layer = following if following in self.layers else self.layers.start
        absent = self.residency.best_absent(layer)
        if absent is not None:
            self._copy_early(layer, absent, worth=0.0)

    def _copy_early(self, layer: int, expert: int, worth: float) -> bool:
        below = self._ram.residency
        source = below.slot(layer, expert)
        if source < 0 or below.is_loading(source):
            return False
        load = self.residency.prefetch(layer, expert, worth=worth, margin=PROMOTION_MARGIN)
        if load is None:
            return False
        self._table_valid = False
        self._promotions[load.slot] = _Promotion(layer, self._copy(source, load.slot))
        return True

    def _admit(self, slot: int) -> None:
        copy = self._promotions.pop(slot).copy
        self._count(copy)
        self._ram.residency.let_go(copy.source)
        self.residency.loaded(slot)


class _Work:
    """What one wave queues, as the bytes of its experts come to lie in their slots."""

    def __init__(self, tier: VramTier, decision: Decision) -> None:
        assert tier._job is not None
        self.hits: tuple[Event, Event, int] | None = None
        self._tier = tier
        self._job = tier._job
        self._decision = decision
        self._slots = {expert: slot for expert, slot, _ in decision.loads}
        self._begun = False

    def resident(self) -> None:
        """Queue the kernels of what is there or on its way already."""
        self._begun = True
        tier, job, decision, compute = self._tier, self._job, self._decision, self._tier.device.compute
        hits = [decision.hits] if decision.hits else []
        tier._launches.announce(job, [*hits, *([pair] for pair in (*decision.joins, *self._slots.items()))])
        timed = bool(hits) and tier._decoding and tier._in_place is not None  # nobody else asks how long they take
        begun = compute.record(timed=True) if timed else None
        tier._launches.launch(job, decision.hits)
        if begun is not None:
            self.hits = begun, compute.record(timed=True), len(decision.hits)
        for expert, slot in decision.joins:
            tier._join(slot)
            tier._launches.launch(job, [(expert, slot)])

    def arrived(self, there: Sequence[tuple[int, int]]) -> None:
        """Experts lie in RAM slots: copy them and compute each behind its copy."""
        tier = self._tier
        copies = tier._copy_in(there, self._slots)
        if not self._begun:  # the link comes first: it is what everything waits for
            self.resident()
        for batch in _batches(len(there), 1 if self._job.few else BATCH, last=not tier._open):
            # They come in order: the last of them is the one to wait for.
            tier.device.compute.wait(copies[batch.stop - 1].end)
            pairs = [(expert, self._slots[expert]) for expert, _ in there[batch.start : batch.stop]]
            for _, slot in pairs:  # whatever the compute stream does from now on finds the bytes there
                tier.residency.loaded(slot)
            tier._launches.launch(self._job, pairs)


def _batches(count: int, most: int, last: bool) -> Iterator[range]:
    """How copies are shared out among launches: `most` to each, but few to the `last` ones of a layer.

    While those are computed nothing is copied, so they begin as early as they can.
    """
    begin = 0
    while begin < count:
        left = count - begin
        size = min(most, max(1, left // 2) if last else left)
        yield range(begin, begin + size)
        begin += size


def _assign(target: Tensor, values: Tensor) -> None:
    target.copy_(values)
