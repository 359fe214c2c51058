"""How progress looks to people and programs: a bar in a terminal, now and then a line in a log, JSON lines.

Owns rate and remaining time. Everything goes to stderr. Must not know what the work is.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

from offload.types import format_size

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

_WINDOW = 30.0  # seconds over which the rate is taken
_LINE_SECONDS = 30.0
_JSON_SECONDS = 1.0


class ProgressDisplay:
    """A bar with rate and remaining time where stderr is a terminal; elsewhere a line every half minute.

    With `as_json` one JSON object per second instead, for programs that watch.
    """

    def __init__(self, as_json: bool = False) -> None:
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._json = as_json
        self._lines = _Lines(self._show, _JSON_SECONDS if as_json else _LINE_SECONDS, last=as_json)

    def __enter__(self) -> Self:
        if sys.stderr.isatty() and not self._json:
            self._bars = _bars()
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def __call__(self, label: str, done: int, total: int) -> None:
        """Bytes `done` of `total` under `label`."""
        if not self._bars:
            self._lines.add(label, done, total)
            return
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total)
        self._bars.update(self._tasks[label], completed=done, total=total)

    def note(self, line: str) -> None:
        """A line that stays on stderr."""
        if self._bars:
            self._bars.console.print(line, markup=False, highlight=False)
        else:
            print(json.dumps({"note": line}) if self._json else line, file=sys.stderr, flush=True)

    def _show(self, label: str, done: int, total: int, rate: float) -> None:
        left = (total - done) / rate if rate else None
        if self._json:
            values = {"progress": label, "bytes": done, "total_bytes": total, "bytes_per_s": rate, "seconds_left": left}
            print(json.dumps(values), file=sys.stderr, flush=True)
            return
        share = f"{format_size(done)} of {format_size(total)} ({100 * done / max(1, total):.1f}%)"
        ahead = "" if left is None else f", {duration(left)} left"
        print(f"{label}: {share}, {rate / 1e6:.0f} MB/s{ahead}", file=sys.stderr, flush=True)


class _Lines:
    """Passes amounts on every `interval` seconds, and the `last` one, with the rate of the last half minute."""

    def __init__(self, show: Callable[[str, int, int, float], None], interval: float, last: bool) -> None:
        self._show, self._interval, self._last = show, interval, last
        self._seen: dict[str, deque[tuple[float, int]]] = {}
        self._shown = time.monotonic()

    def add(self, label: str, done: int, total: int) -> None:
        """The amounts of this moment."""
        now = time.monotonic()
        seen = self._seen.setdefault(label, deque([(now, done)]))
        seen.append((now, done))
        while now - seen[0][0] > _WINDOW and len(seen) > 2:
            seen.popleft()
        if now - self._shown >= self._interval or (self._last and done == total):
            self._shown = now
            self._show(label, done, total, (done - seen[0][1]) / max(now - seen[0][0], 1e-9))


def duration(seconds: float) -> str:
    """`seconds` in words: 40 s, 12 min, 3 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 100 else f"{minutes} min"


def _bars() -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    return Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
