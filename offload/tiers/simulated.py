"""A device made of host memory, whose streams are worked off only when somebody can tell.

Owns a model of what an accelerator may do with queued work: anything that its streams and events allow, in
an order drawn from `seed`, as late as possible where nothing was drawn. With it the tiers are tested, and
run where there is no accelerator. It finds
- races: two accesses to the same bytes, one of them a write, that no event puts in order, whether or not
  this run happened to get them wrong;
- memory that was not set aside: `empty` beyond the capacity, or after `seal`;
- calls outside `guard`, which would go to another device.
Must not know experts or slots.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from offload.errors import BudgetError, DeviceError
from offload.tiers.device import Event, Memory
from offload.types import format_size

T = TypeVar("T")

COPY_BYTES_PER_S = 25e9
"""Rate that events report for copies. Nothing takes that time."""


class RaceError(AssertionError):
    """Two accesses that no event puts in order."""


class _Access(NamedTuple):
    begin: int
    end: int
    write: bool
    stream: int
    when: int


@dataclass
class _Point:
    """What has happened before something: per stream, the number of its operations."""

    seen: list[int]

    def merge(self, other: _Point) -> None:
        self.seen = [max(a, b) for a, b in zip(self.seen, other.seen, strict=True)]


@dataclass(eq=False)
class SimulatedEvent:
    """A point in a simulated stream."""

    stream: SimulatedStream
    position: int
    before: _Point
    clock_s: float
    timed: bool

    def done(self) -> bool:
        device = self.stream.device
        device.check()
        device.shuffle()
        if self.stream.finished < self.position:
            return False
        device.host.merge(self.before)
        return True

    def wait(self) -> None:
        self.stream.device.check()
        self.stream.run_to(self.position)
        self.stream.device.host.merge(self.before)

    def seconds_since(self, earlier: Event) -> float:
        first = cast(SimulatedEvent, earlier)
        assert self.timed and first.timed, "an event without a time was asked for it"
        assert self.stream is first.stream, "times of different streams do not compare"
        assert self.stream.finished >= self.position, "the event has not been passed"
        return self.clock_s - first.clock_s


class SimulatedStream:
    """Operations in order; `finished` of them have happened."""

    def __init__(self, device: SimulatedDevice, number: int) -> None:
        self.device = device
        self.number = number
        self.finished = 0
        self._queued = 0
        self._queue: deque[Callable[[], None]] = deque()
        self._before = device.nothing()
        self._clock_s = 0.0

    def copy(self, target: Tensor, source: Tensor) -> None:
        assert target.nbytes == source.nbytes, f"{source.nbytes} bytes into {target.nbytes}"
        self._enter([source], [target], lambda: _copy(target, source))
        self._clock_s += source.nbytes / COPY_BYTES_PER_S
        self.device.bytes_copied += source.nbytes

    def launch(self, work: Callable[[], None], *, reads: Sequence[Tensor] = (), writes: Sequence[Tensor] = ()) -> None:
        self._enter(reads, writes, work)

    def record(self, timed: bool = False) -> Event:
        self.device.check()
        return SimulatedEvent(self, self._queued, _Point(list(self._before.seen)), self._clock_s, timed)

    def wait(self, event: Event) -> None:
        point = cast(SimulatedEvent, event)
        self._enter([], [], lambda: point.stream.run_to(point.position))
        self._before.merge(point.before)

    def run_to(self, position: int) -> None:
        """Let the operations up to `position` happen."""
        while self.finished < position:
            work = self._queue.popleft()
            try:
                work()
            finally:
                self.finished += 1

    def step(self) -> None:
        """Let one operation happen, if there is one."""
        self.run_to(min(self.finished + 1, self._queued))

    def drain(self) -> None:
        """Let everything happen."""
        self.run_to(self._queued)

    def _enter(self, reads: Sequence[Tensor], writes: Sequence[Tensor], work: Callable[[], None]) -> None:
        self.device.check()
        self._before.merge(self.device.host)  # queued after what the host has seen happen
        self._queued += 1
        self.device.note(reads, writes, self.number, self._queued, self._before)
        self._before.seen[self.number] = self._queued
        self._queue.append(work)
        self.device.shuffle()


@dataclass
class _Counts:
    used: int = 0
    peak: int = 0
    kept: list[Tensor] = field(default_factory=list)


class SimulatedDevice:
    """`memory` bytes of device memory. Without a seed everything happens as late as possible."""

    torch_device = torch.device("cpu")
    driver_nbytes = 0
    blas_nbytes = 0

    def __init__(self, memory: int = 1 << 30, *, seed: int | None = None, name: str = "simulated device") -> None:
        self.name = name
        self.bytes_copied = 0
        self.lost = False
        self.host = self.nothing()
        self._total = self._limit = memory
        self._counts = _Counts()
        self._sealed = False
        self._guarded = 0
        self._dice = None if seed is None else random.Random(seed)
        self._accesses: list[_Access] = []
        self.compute = SimulatedStream(self, 0)
        self.copies = SimulatedStream(self, 1)

    # -- the protocol ------------------------------------------------------------------------

    def memory(self) -> Memory:
        return Memory(self._total - self._counts.used, self._total)

    def rounding_nbytes(self, nbytes: int) -> int:
        return 0

    def limit(self, nbytes: int) -> None:
        self._limit = min(nbytes, self._total)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        assert not self._sealed, "device memory was asked for after everything had been set aside"
        tensor = torch.empty(tuple(shape), dtype=dtype)
        counts = self._counts
        if counts.used + tensor.nbytes > self._limit:
            raise BudgetError(
                f"{self.name}: {format_size(tensor.nbytes)} cannot be allocated, "
                f"{format_size(self._limit - counts.used)} are free; give a smaller --vram"
            )
        counts.kept.append(tensor)
        counts.used += tensor.nbytes
        counts.peak = max(counts.peak, counts.used)
        # What was never written must not look right by chance.
        return tensor.view(torch.uint8).fill_(0xFF).view(dtype).view(tuple(shape)) if tensor.numel() else tensor

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    def page_lock(self, memory: Tensor, granule: int) -> str | None:
        return None

    def call(self, work: Callable[[], T]) -> T:
        self.check()
        self.compute.drain()
        return work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.check()
        return lambda: self.compute.launch(work)

    def sender(self, target: Tensor) -> Callable[[Tensor], None]:
        self.check()

        def send(source: Tensor) -> None:
            staged = source.clone()
            self.compute.copy(target, staged)

        return send

    def synchronize(self) -> None:
        self.check()
        for stream in (self.compute, self.copies):
            stream.drain()
            self.host.merge(stream.record().before)  # type: ignore[attr-defined]

    @contextmanager
    def guard(self) -> Iterator[None]:
        self._guarded += 1
        try:
            yield
        finally:
            self._guarded -= 1

    def peak_nbytes(self) -> int:
        return self._counts.peak

    def close(self) -> None:
        pass

    # -- for tests ---------------------------------------------------------------------------

    def seal(self) -> None:
        """From now on `empty` is an error."""
        self._sealed = True

    def host_access(self, memory: Tensor, *, write: bool) -> None:
        """The host reads or writes `memory` now. Raises RaceError if queued work may still touch it."""
        self.note([] if write else [memory], [memory] if write else [], -1, 0, self.host)

    # -- for the streams ---------------------------------------------------------------------

    @staticmethod
    def nothing() -> _Point:
        """Nothing has happened before it."""
        return _Point([0, 0])

    def check(self) -> None:
        """Raise DeviceError if the device is lost."""
        assert self._guarded, "a call outside of guard goes to whichever device is current"
        if self.lost:
            raise DeviceError(f"{self.name} failed: it was lost; the model must be loaded again")

    def shuffle(self) -> None:
        """Let some of what is queued happen."""
        if self._dice is not None:
            while self._dice.random() < 0.5:
                self._dice.choice((self.compute, self.copies)).step()

    def note(self, reads: Sequence[Tensor], writes: Sequence[Tensor], stream: int, when: int, before: _Point) -> None:
        """Compare accesses with all earlier ones that may still be under way, and remember them."""
        self._accesses = [old for old in self._accesses if old.when > self.host.seen[old.stream]]
        new = [
            _Access(t.data_ptr(), t.data_ptr() + t.nbytes, write, stream, when)
            for tensors, write in ((reads, False), (writes, True))
            for t in tensors
        ]
        for access in new:
            for old in self._accesses:
                if not (old.write or access.write) or old.stream == stream:
                    continue
                if old.begin < access.end and access.begin < old.end and old.when > before.seen[old.stream]:
                    raise RaceError(
                        f"{'write' if access.write else 'read'} by {_WHO[stream]} is not ordered after the "
                        f"{'write' if old.write else 'read'} by {_WHO[old.stream]} of the same bytes"
                    )
        if stream >= 0:
            self._accesses += new


_WHO = {-1: "the host", 0: "the compute stream", 1: "the copy stream"}


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source.view(target.shape))
