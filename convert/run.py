"""One run of a conversion between its first and its last byte: which work is done when, by which thread.

Owns the order of work, the threads and the bound on memory. Every item (one routed expert, one file of resident
tensors) has a place that is known beforehand, and its record goes to the journal after its bytes are durable: a killed
run loses a moment's work, and the result is that of an undisturbed one. Runs that share a store divide it by units;
which of them does what changes no byte.

Fetching, encoding and writing have threads of their own, so that the slowest of link, cores and drive is always busy.
Memory: `workers` items are encoded while `ahead` more experts are being fetched and two are being written; an expert in
flight costs its FP8 source and twice its encoded bytes. A quarter of the workers at most handles resident tensors,
which are larger.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures import ThreadPoolExecutor as _Pool
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from convert.committer import Committer
from convert.encode import EncodedExpert, encode_expert, load_expert
from convert.journal import Journal, Records, Unit, recorded
from convert.plan import ConversionPlan
from convert.progress import Progress
from convert.threads import one_core_each
from convert.unit import (
    UnitWork,
    expert_nbytes,
    experts_of,
    finished_nbytes,
    resident_nbytes,
    surviving,
    unit_nbytes,
)
from offload.interrupts import uninterrupted
from offload.types import ExpertId

_WRITERS = 2  # one copies into its extent while the drive is at the other's
_MOMENT_S = 0.2
"""How long an interrupt waits at most while results are waited for."""


@dataclass(frozen=True)
class _Item:
    """Something to do: an expert, or (None) the resident tensors of `work`."""

    work: UnitWork
    expert: ExpertId | None
    nbytes: int


class Run:
    """Converts `units` as far as no other process does.

    `found` is what the journal knew before, `nbytes` counts the source's bytes this run dealt with.
    """

    def __init__(
        self,
        plan: ConversionPlan,
        directory: Path,
        journal: Journal,
        units: Sequence[Unit],
        workers: int,
        progress: Progress,
    ) -> None:
        self.plan, self.directory, self.journal, self.units = plan, directory, journal, units
        self.workers, self.ahead = workers, plan.checkpoint.source.parallel_reads
        self.progress = progress
        self.nbytes = 0
        self.found = Records()
        self._left: dict[Unit, int] = {}
        for unit in units:
            there = surviving(plan, directory, unit, recorded(directory, unit))
            self.found.update(there)
            self._left[unit] = unit_nbytes(plan, unit) - finished_nbytes(plan, unit, there)

    @property
    def experts(self) -> int:
        """Routed experts of the run's units."""
        return sum(1 for unit in self.units for _ in experts_of(self.plan, unit))

    @property
    def resumed(self) -> int:
        """Experts that were there before."""
        return len(self.found.experts)

    @property
    def resumed_files(self) -> int:
        """Files of resident tensors that were there before."""
        return len(self.found.files)

    def convert(self, committed: Callable[[Records], None] | None = None) -> None:
        """Do everything that can be done. What is done is durable and recorded afterwards, also when this raises.

        `committed` receives, in another thread, records that have become durable.
        """
        opened: list[UnitWork] = []
        committer = Committer(committed)
        try:
            with one_core_each(self.workers) as encoders, _Pool(_WRITERS) as writers, _Pool(self.ahead) as fetchers:
                try:
                    for item, records in self._results(self._items(opened), fetchers, encoders, writers):
                        committer.add(item.work, records)
                        self._advance(item)
                except BaseException:
                    # What waits is dropped, reads under way are given up.
                    for pool in (fetchers, encoders, writers):
                        pool.shutdown(wait=False, cancel_futures=True)
                    self.plan.checkpoint.source.cancel()
                    raise
        finally:
            try:
                committer.close()
            finally:
                for work in opened:
                    work.close()

    def _items(self, opened: list[UnitWork]) -> Iterator[_Item]:
        """All items of all units that can be claimed; units are claimed when their turn comes."""
        for work in self._claims():
            opened.append(work)
            work.open()
            if work.lacks_resident:
                yield _Item(work, None, resident_nbytes(self.plan, work.unit))
            for expert in work.missing_experts:
                yield _Item(work, expert, expert_nbytes(self.plan, expert))

    def _claims(self) -> Iterator[UnitWork]:
        """Units that nobody else works on. Those of others are asked for again: their owner may have died."""
        waiting, found = list(self.units), True
        while waiting and found:
            found = False
            for unit in list(waiting):
                claim = self.journal.claim(unit)
                if claim is None:
                    self._left[unit] = 0
                    continue
                waiting.remove(unit)
                found = True
                work = UnitWork(self.plan, self.directory, unit, claim)
                self._left[unit] = unit_nbytes(self.plan, unit) - finished_nbytes(self.plan, unit, claim.records)
                yield work

    def _results(
        self, items: Iterator[_Item], fetchers: _Pool, encoders: _Pool, writers: _Pool
    ) -> Iterator[tuple[_Item, Records]]:
        """Items in the order in which they get done; the number of those in flight is bounded."""
        flight: dict[Future[Records], _Item] = {}

        def landed() -> Iterator[tuple[_Item, Records]]:
            done: set[Future[Records]] = set()
            while not done:
                with uninterrupted():
                    done, _ = wait(flight, _MOMENT_S, FIRST_COMPLETED)
            for future in [future for future in flight if future in done]:
                with uninterrupted():
                    records = future.result()
                yield flight.pop(future), records

        for item in self._interleaved(items, flight):
            while self._full(item, flight.values()):
                yield from landed()
            with uninterrupted():
                if item.expert is None:
                    flight[encoders.submit(item.work.write_resident)] = item
                else:
                    fetched = fetchers.submit(load_expert, self.plan, item.expert)
                    encoded = encoders.submit(_encode, self.plan, item.expert, fetched)
                    flight[writers.submit(_write, item.work, item.expert, encoded)] = item
        while flight:
            yield from landed()

    def _interleaved(self, items: Iterator[_Item], flight: Mapping[Future[Records], _Item]) -> Iterator[_Item]:
        """`items`, but resident tensors that would have to wait are put off: experts go on beside them.

        `flight` is what is being done whenever the next item is asked for.
        """
        put_off: deque[_Item] = deque()
        for item in items:
            while put_off and not self._residents_full(flight.values()):
                yield put_off.popleft()
            if item.expert is None and self._residents_full(flight.values()):
                put_off.append(item)
            else:
                yield item
        yield from put_off

    def _residents_full(self, flight: Collection[_Item]) -> bool:
        """Whether as many workers as may be are busy with resident tensors."""
        return sum(item.expert is None for item in flight) >= max(1, self.workers // 4)

    def _full(self, item: _Item, flight: Collection[_Item]) -> bool:
        """Whether `item` has to wait until something in flight is done."""
        many = len(flight) >= self.ahead + self.workers + _WRITERS
        return many or (item.expert is None and self._residents_full(flight))

    def _advance(self, item: _Item) -> None:
        self.nbytes += item.nbytes
        self._left[item.work.unit] -= item.nbytes
        self.progress("converting", self.nbytes, self.nbytes + sum(self._left.values()))


def _encode(plan: ConversionPlan, expert: ExpertId, fetched: Future[dict[str, Tensor]]) -> EncodedExpert:
    return encode_expert(plan, expert, fetched.result())


def _write(work: UnitWork, expert: ExpertId, encoded: Future[EncodedExpert]) -> Records:
    return work.write_expert(expert, encoded.result())
