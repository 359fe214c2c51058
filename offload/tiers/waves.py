"""The waves of a layer on one device: what they copy and what they compute, queued in the order of need.

Owns that order and the slots that queued kernels read: all of a wave's are held until an event says that its kernels
are over. Must not choose experts: residency decides what is there, what comes and what goes.

A wave is computed like this: experts whose bytes are in RAM are copied, on a stream of its own; kernels of the hits
are queued; every other expert is copied as soon as its bytes are in RAM, and its kernel is queued behind its copy.
The host waits for none of it, except for the wave before the last one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from offload.cache.decisions import Decision, Service
from offload.cache.residency import Residency
from offload.cache.split import SplitModel
from offload.tiers.device import Device, Event
from offload.tiers.launches import LayerJob, SlotLaunches
from offload.tiers.link import Link
from offload.tiers.promotions import Promotions
from offload.tiers.ram import RamTier

BATCH = 4
"""Experts per launch of a long pass at most, once their copies are queued: the rows of one do not fill a device."""


@dataclass
class _Queued:
    """A wave of which everything is queued. Its slots are held until `used`."""

    slots: list[int]
    used: Event
    timed: tuple[Event, Event] | None
    """Begin and end of the kernels of one expert, where that is of interest."""


class Waves:
    """Carries out what `residency` decides about the experts of one device."""

    def __init__(
        self,
        device: Device,
        ram: RamTier,
        residency: Residency,
        link: Link,
        promotions: Promotions,
        launches: SlotLaunches,
        split: SplitModel | None,
    ) -> None:
        """`split` is told how long the kernels of an expert take while decoding; None: nobody asks."""
        self._residency = residency
        self._link = link
        self._promotions = promotions
        self._launches = launches
        self._compute = device.compute
        self._split = split
        self._ram = ram
        self._open: deque[tuple[Decision, Service | None]] = deque()  # started, with what they demand of RAM
        self._queued: deque[_Queued] = deque()

    @property
    def pending(self) -> bool:
        """Whether slots are held for kernels that may not be over."""
        return bool(self._queued)

    def serve(self, job: LayerJob, wanted: list[int]) -> None:
        """Queue the outputs of the experts `wanted` (ascending) for their positions."""
        self._residency.complete(
            self._residency.open(job.layer, wanted, self._start),
            self._start,
            lambda decision: self._finish(job, decision),
            self._stuck,
        )

    def settle(self) -> None:
        """Wait for all kernels and copies that waves have queued, and let go of their slots."""
        while self._queued:
            self._retire()
        self._link.settle_all()

    def abandon(self) -> None:
        """A step broke off, and the device has been waited for."""
        self._open.clear()
        self._queued.clear()
        self._link.abandon()
        self._launches.abandon()

    def _start(self, decision: Decision) -> None:
        experts = [load.expert for load in decision.loads]
        self._open.append((decision, self._ram.open(decision.layer, experts) if experts else None))

    def _finish(self, job: LayerJob, decision: Decision) -> None:
        expected, demand = self._open.popleft()
        assert expected is decision, "waves are finished in the order in which they were started"
        wave = _Wave(self, job, decision)
        if demand is None or not demand.held.hits:
            wave.queue_present()  # the first expert from RAM may take a while
        if demand is not None:
            self._ram.complete(demand, wave.queue_arrived)
        for slot in decision.slots:
            self._residency.hold(slot)
        self._queued.append(_Queued(decision.slots, self._launches.end(), wave.timed))
        while len(self._queued) > 1:
            self._retire()

    def _retire(self) -> None:
        wave = self._queued.popleft()
        wave.used.wait()
        if wave.timed is not None and self._split is not None:
            begun, ended = wave.timed
            self._split.observed("kernel", ended.seconds_since(begun))
        for slot in wave.slots:
            self._residency.let_go(slot)

    def _stuck(self) -> None:
        if self._queued:
            self._retire()
        else:
            self._promotions.admit_oldest()


class _Wave:
    """What one wave queues, as the bytes of its experts come to lie in RAM."""

    def __init__(self, waves: Waves, job: LayerJob, decision: Decision) -> None:
        self.timed: tuple[Event, Event] | None = None
        self._waves = waves
        self._job = job
        self._decision = decision
        self._slots = {expert: slot for expert, slot, _ in decision.loads}
        self._begun = False

    def queue_present(self) -> None:
        """Queue the kernels of what is there or on its way already."""
        self._begun = True
        waves, job, decision = self._waves, self._job, self._decision
        hits = [decision.hits] if decision.hits and not job.present else []
        waves._launches.announce(job, [*hits, *([pair] for pair in (*decision.joins, *self._slots.items()))])
        waves._launches.hits(job, decision.hits)
        for expert, slot in decision.joins:
            waves._promotions.join(slot, waves._compute)
            waves._launches.launch(job, [(expert, slot)])

    def queue_arrived(self, there: Sequence[tuple[int, int]]) -> None:
        """Experts lie in RAM slots: copy them and compute each behind its copy."""
        waves = self._waves
        copies = waves._link.copy_demanded([(source, self._slots[expert]) for expert, source in there])
        if not self._begun:  # the link comes first: it is what everything waits for
            self.queue_present()
        for batch in _batches(len(there), 1 if self._job.few else BATCH, last=not waves._open):
            # They come in order: the last of them is the one to wait for.
            waves._compute.wait(copies[batch.stop - 1].end)
            pairs = [(expert, self._slots[expert]) for expert, _ in there[batch.start : batch.stop]]
            for _, slot in pairs:  # whatever the compute stream does from now on finds the bytes there
                waves._residency.loaded(slot)
            timed = self.timed is None and waves._split is not None and self._job.x.shape[0] == 1
            begun = waves._compute.record(timed=True) if timed else None
            waves._launches.launch(self._job, pairs)
            if begun is not None:
                self.timed = begun, waves._compute.record(timed=True)


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
