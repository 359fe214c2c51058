"""Measuring the drive: random expert-size extents through the reader that a run uses, alone and beside the kernels.

Owns the extents, a test file where there is no store yet, and the measurements.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import psutil

from offload.errors import BudgetError
from offload.store import Store
from offload.store.layout import ExpertLayout
from offload.tiers.disk import PART_NBYTES, READERS, DiskReader
from offload.tiers.host import SlotPool
from offload.tiers.reads import Read
from offload.tune.arena import SWEPT
from offload.types import PAGE, ExpertId, Extent, align_up, format_size

DEPTHS = (1, 2, 4, 8, 16, 32)

MOST_SLOTS = 64

SAMPLES = 32
"""Small reads of which a median is taken."""

BURSTS, BURST = 8, 4
"""Bursts of which a median is taken, and the reads of each."""

TURNS = 4
"""Alternations of drive and kernels alone and together."""


@contextmanager
def extents_at(folder: Path, store: Store | None, file_nbytes: int, layout: ExpertLayout) -> Iterator[list[Extent]]:
    """Expert-size extents to read: the store's own, or those of a file of `file_nbytes` written for the purpose.

    Raises BudgetError when the folder has no room for that file.
    """
    if store is not None:
        yield [
            store.locate(ExpertId(layer, expert))
            for layer in store.config.moe_layers
            for expert in range(store.config.n_routed_experts)
        ]
        return
    size = align_up(layout.stride)
    need = max(4 * size, file_nbytes)
    free = psutil.disk_usage(str(folder)).free
    if free < 2 * need:
        raise BudgetError(
            f"{folder} has {format_size(free)} free; measuring the drive needs a file of {format_size(need)} "
            "and some room beside it"
        )
    with tempfile.NamedTemporaryFile(dir=folder, prefix="expertpager-probe-") as file:
        block = np.random.default_rng(0).integers(0, 256, min(need, 32 << 20), np.uint8).tobytes()
        for _ in range(0, need, len(block)):
            file.write(block)
        file.flush()
        _sync(file.fileno())
        path = Path(file.name)
        yield [Extent(path, at, layout.stride) for at in range(0, need - size + 1, size)]


def _sync(fd: int) -> None:
    os.fsync(fd)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def slots_for(extents: Sequence[Extent]) -> SlotPool:
    """Memory to read them into: as many slots as are ever asked for, and more than the processor's caches hold, as a
    run's are."""
    nbytes = extents[0].nbytes
    return SlotPool(max(_asked(max(DEPTHS), nbytes), min(MOST_SLOTS, SWEPT // nbytes)), align_up(nbytes) + PAGE)


def _asked(threads: int, nbytes: int) -> int:
    """Reads of `nbytes` asked for at a time: twice as many as `threads` work on, so that none waits for whoever
    asks."""
    return 2 * max(1, threads * PART_NBYTES // max(nbytes, PART_NBYTES)) + 2


@dataclass(frozen=True)
class DriveFigures:
    """What was measured of a drive."""

    rates: dict[str, float]
    """Bytes per second by number of reads under way."""
    latency_s: float
    """Seconds of a single small read."""
    processor_s: float
    """Seconds of the processor for a read of an expert beyond those for a small one."""
    buffered: bool
    """Whether direct I/O was refused."""


def measure_drive(extents: Sequence[Extent], pool: SlotPool, seconds: float) -> DriveFigures:
    """`seconds` for each number of reads under way. `pool`: see `slots_for`."""
    rates, buffered = {}, False
    for depth in DEPTHS:
        rates[str(depth)], buffered = drive_rate(extents, pool, depth, seconds)
    rng = random.Random(0)
    with closing(DiskReader(threads=1)) as reader:
        latency = median(_burst(reader, [_small(rng.choice(extents))], pool)[0] for _ in range(SAMPLES))
    with closing(DiskReader(threads=READERS)) as reader:
        bursts = [rng.choices(extents, k=BURST) for _ in range(BURSTS)]
        large = median(_burst(reader, burst, pool, BURST * n)[1] for n, burst in enumerate(bursts))
        small = median(_burst(reader, [_small(extent) for extent in burst], pool)[1] for burst in bursts)
    return DriveFigures(rates, latency, max(0.0, large - small) / BURST, buffered)


def drive_rate(extents: Sequence[Extent], pool: SlotPool, threads: int, seconds: float) -> tuple[float, bool]:
    """(bytes per second of random extents with `threads` of them under way, whether direct I/O was refused)."""
    with closing(DiskReader(threads=threads)) as reader:
        return _read_rate(reader, extents, pool, threads, random.Random(threads), seconds), reader.buffered


def _read_rate(
    reader: DiskReader, extents: Sequence[Extent], pool: SlotPool, threads: int, rng: random.Random, seconds: float
) -> float:
    """Random extents, each into the slot of `pool` that was read into longest ago."""
    free = deque(range(pool.slots))
    asked = _asked(threads, extents[0].nbytes)
    done = under_way = 0
    begun = time.perf_counter()
    while True:
        while under_way < asked and time.perf_counter() - begun < seconds:
            slot = free.popleft()
            reader.submit([Read(rng.choice(extents), pool.buffer(slot), "a sample", tag=slot)])
            under_way += 1
        if not under_way:
            return done / (time.perf_counter() - begun)
        read = reader.completed()
        assert read is not None
        under_way -= 1
        if read.error is not None:
            raise read.error
        free.append(read.tag)
        done += read.extent.nbytes


def _burst(reader: DiskReader, extents: Sequence[Extent], pool: SlotPool, first: int = 0) -> tuple[float, float]:
    """(seconds, seconds of the processor) of reads that are asked for at once, into slots from `first` on."""
    begun, busy = time.perf_counter(), time.process_time()
    slots = [pool.buffer((first + number) % pool.slots) for number in range(len(extents))]
    reader.submit([Read(each, slot, "a sample") for each, slot in zip(extents, slots, strict=True)])
    for _ in extents:
        read = reader.completed()
        assert read is not None
        if read.error is not None:
            raise read.error
    return time.perf_counter() - begun, time.process_time() - busy


def _small(extent: Extent) -> Extent:
    """Its first bytes."""
    return Extent(extent.path, extent.offset, 512)


@dataclass(frozen=True)
class Together:
    """What is left of either rate while drive and kernels are both busy: 1 is all of it."""

    kernels: float
    drive: float


def measure_together(
    extents: Sequence[Extent], pool: SlotPool, work: Callable[[], object], seconds: float
) -> Together:
    """Shares of the rates alone: medians over TURNS alternations of `seconds` alone each, and together.

    `work` is one call of the kernels. On few cores the system's part of the reads takes time from them, and both
    use the same memory.
    """
    rng = random.Random(0)
    kernels, drive = [], []

    def read() -> float:
        return _read_rate(reader, extents, pool, READERS, rng, seconds)

    with closing(DiskReader(threads=READERS)) as reader, ThreadPoolExecutor(1) as other:
        for _ in range(TURNS):
            alone = read(), _call_rate(work, seconds)
            reading = other.submit(read)
            # As long as it takes: what is under way at the end may be most of what was read.
            kernels.append(_call_rate(work, seconds, reading) / alone[1])
            drive.append(reading.result() / alone[0])
    return Together(min(1.0, median(kernels)), min(1.0, median(drive)))


def _call_rate(work: Callable[[], object], seconds: float, until: Future[float] | None = None) -> float:
    """Calls per second, for so many seconds, or until something else is done."""
    begun, calls = time.perf_counter(), 0
    while not calls or (not until.done() if until else time.perf_counter() - begun < seconds):
        work()
        calls += 1
    return calls / (time.perf_counter() - begun)
