"""Reads that nobody asked for: experts that later layers will probably need, while the drive idles.

Owns which of them are under way and what becomes of them: residents, joined by a demand, or withdrawn. They are
issued and settled between layers only, so that a replay can repeat it. Must not know files, nor what an expert is
worth: `LookAhead` and the residency do.
"""

from __future__ import annotations

from collections.abc import Sequence

from offload.cache.lookahead import LookAhead
from offload.cache.residency import Residency
from offload.cache.speculation import granted
from offload.cache.trace import TraceRecorder
from offload.telemetry import Telemetry
from offload.tiers.reads import Read
from offload.tiers.slot_reads import SlotReads


class ReadsAhead:
    """Speculative reads among `reads`.

    The recorder, if there is one, is told of each, `telemetry` why there are no more.
    """

    def __init__(
        self,
        reads: SlotReads,
        residency: Residency,
        lookahead: LookAhead,
        recorder: TraceRecorder | None,
        telemetry: Telemetry,
    ) -> None:
        self.lookahead = lookahead
        self._reads = reads
        self._residency = residency
        self._recorder = recorder
        self._telemetry = telemetry
        self._pending: dict[int, tuple[int, int]] = {}  # slot -> (layer, expert), until settled or demanded
        self._ended: list[Read] = []

    @property
    def pending(self) -> bool:
        """Whether there are reads that nobody has demanded and that are not settled."""
        return bool(self._pending)

    @property
    def arrived(self) -> bool:
        """Whether some of those have ended."""
        return bool(self._ended)

    def begin_step(self, tokens: Sequence[int]) -> None:
        """A forward pass over `tokens` begins."""
        lookahead, residency = self.lookahead, self._residency
        lookahead.begin_step(() if self._complete else tokens, residency.events.absent)
        if residency.slots == residency.shape.keys:  # what is resident now remains so: no layer need ask again
            lookahead.forget(lambda layer, expert: residency.slot(layer, expert) >= 0)
        self.begin(0)

    @property
    def _complete(self) -> bool:
        """Whether every expert has a slot, for good."""
        return self._residency.resident == self._residency.shape.keys

    def begin(self, first: int) -> None:
        """Use an idle drive to read what the layers from `first` on will probably need."""
        lookahead = self.lookahead
        if lookahead.idle or self._complete:
            return  # nothing to read
        if len(self._reads) > len(self._pending):
            return  # somebody waits for a read
        for layer, load in granted(lookahead, self._residency, first, len(self._pending)):
            if self._recorder:
                self._recorder.prefetch(0, layer, load.expert)
            self._pending[load.slot] = layer, load.expert
            self._reads.prefetch(layer, load)

    def demanded(self, slot: int) -> Read | None:
        """Somebody waits for what is read into `slot`: it goes on as a demand. The read, if it has ended already."""
        self._pending.pop(slot, None)
        if self._reads.promote(slot):
            return None
        ended = next((read for read in self._ended if read.tag == slot), None)
        if ended is not None:
            self._ended.remove(ended)
        return ended

    def take(self, read: Read) -> bool:
        """Take note of a read that has ended, if it is one of these: it counts from the next layer on."""
        if read.tag not in self._pending:
            return False
        self._ended.append(read)
        return True

    def settle(self, past: int) -> None:
        """Reads that have ended become residents; those for layers before `past` are withdrawn."""
        for read in self._ended:
            layer, expert = self._pending.pop(read.tag)
            (self._residency.loaded if read.error is None else self._residency.failed)(read.tag)
            if self._recorder:
                self._recorder.prefetch(1 if read.error is None else 3, layer, expert)
        self._ended.clear()
        for slot, (layer, expert) in list(self._pending.items()):
            if layer < past and self._reads.cancel(slot):
                del self._pending[slot]
                self._residency.cancelled(slot)
                victim = self._residency.holder(slot)
                if victim is not None:
                    self._reads.restored(slot, *victim)
                if self._recorder:
                    self._recorder.prefetch(2, layer, expert)
        self.lookahead.learn(self._residency.events)
        if self.lookahead.off_reason is not None:
            self._telemetry.note(self.lookahead.off_reason)

    def abandon(self) -> None:
        """A step broke off, and all reads have been dropped."""
        self._ended.clear()
        self._pending.clear()
