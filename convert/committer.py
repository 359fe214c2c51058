"""Finished work on its way into the journal, in a thread of its own, so that encoding never waits for the drive.

Owns when work is made durable: every second, or sooner when much has piled up. Must not know what the work is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from convert.journal import Records
from convert.unit import UnitWork
from offload.interrupts import uninterrupted

COMMIT_SECONDS = 1.0
"""Work that a kill may cost."""
COMMIT_ITEMS = 64
_BEHIND = 4  # commits' worth of items that may wait for a slow drive


class Committer:
    """Collects records and commits them in batches, one batch at a time; `committed` is told of each."""

    def __init__(self, committed: Callable[[Records], None] | None) -> None:
        self._committed = committed
        self._thread = ThreadPoolExecutor(1)
        self._pending: dict[UnitWork, Records] = {}
        self._count = 0
        self._running: Future[None] | None = None
        self._last = time.monotonic()

    def add(self, work: UnitWork, records: Records) -> None:
        """Take `records` of `work`, whose bytes are written. Raises what a commit before this one met."""
        self._pending.setdefault(work, Records()).update(records)
        self._count += len(records.experts) + len(records.files)
        due = self._count >= COMMIT_ITEMS or time.monotonic() - self._last > COMMIT_SECONDS
        idle = self._running is None or self._running.done()
        if due and (idle or self._count >= _BEHIND * COMMIT_ITEMS):
            self._begin()

    def close(self) -> None:
        """Commit the rest and wait for it."""
        try:
            self._begin()
            self._wait()
        finally:
            self._thread.shutdown()

    def _begin(self) -> None:
        self._wait()
        pending, self._pending, self._count = self._pending, {}, 0
        self._last = time.monotonic()
        if pending:
            with uninterrupted():
                self._running = self._thread.submit(self._commit, pending)

    def _wait(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _commit(self, pending: dict[UnitWork, Records]) -> None:
        for work, records in pending.items():
            work.commit(records)
            if self._committed:
                self._committed(records)
