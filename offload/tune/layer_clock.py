"""When the experts of one layer are there, and how long the processor waits for them.

Owns the clocks of drive and processor within a layer. Pure: no shapes of models, no measuring. The structure is the
runtime's. Routers applied early, and the token table, name experts of a layer before its attention; those that are
absent are read while attention is computed. Then the layer asks for everything else that is missing at once, computes
the shared expert and the resident ones meanwhile, then each missing one as it arrives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

from offload.tiers.disk import PART_NBYTES, READERS
from offload.tune.machine import MachineSpec


@dataclass(frozen=True)
class Demand:
    """What becomes of the demands of decoding, each as a share of them."""

    hit: float
    """Need no read."""
    ahead: float = 0.0
    """Need a read that has begun before they are made."""
    wasted: float = 0.0
    """Reads ahead that no demand follows, per demand."""
    prefetch_depth: int = 0
    """Layers ahead for which routers are applied early."""

    @property
    def reads(self) -> float:
        """Reads per demand."""
        return 1 - self.hit + self.wasted

    @property
    def foretold(self) -> float:
        """Share of the demands that need a read whose read has begun before."""
        return min(1.0, self.ahead / (1 - self.hit)) if self.hit < 1 else 0.0

    @classmethod
    def counted(
        cls, hits: int, misses: int, issued: int = 0, useful: int = 0, late: int = 0, prefetch_depth: int = 0
    ) -> Demand:
        """From a run's counters, in which a demand for what is read ahead is a hit."""
        demands, ahead = max(1, hits + misses), useful + late
        return cls(max(0.0, hits - ahead) / demands, ahead / demands, max(0, issued - ahead) / demands, prefetch_depth)


@dataclass(frozen=True)
class LayerWork:
    """What a layer of one token gives drive and processor to do."""

    experts: int
    """Routed experts that are used."""
    nbytes: int
    """Bytes of one of them."""
    compute_s: float
    """Seconds of one of them, with an idle drive."""
    shared_s: float
    """Seconds of the shared expert."""
    attention_s: float
    """Seconds of what comes between a router applied early and the layer's own."""
    gap_s: float = 0.0
    """Seconds there that the drive does not slow down: small kernels, routing, Python."""


@dataclass(frozen=True)
class LayerTime:
    """Expected seconds of one layer."""

    experts_s: float
    waiting_s: float
    slowed_s: float
    """What reads ahead add to attention: both use the same memory, and reads take a processor's time."""


def layer_seconds(
    misses: int, hits: int, *, compute: float, arrivals: Sequence[float], ahead: float = 0.0
) -> tuple[float, float]:
    """(time, waiting) of the routed experts of one layer: hits are computed while misses are read.

    `arrivals` are the times after the request at which misses are there, `ahead` what else is computed in the
    meantime before the hits; it is no part of the time.
    """
    now = ahead + hits * compute
    waited = 0.0
    for arrival in arrivals[:misses]:
        waited += max(0.0, arrival - now)
        now = max(now, arrival) + compute
    return now - ahead, waited


def arrival_times(machine: MachineSpec, misses: int, nbytes: int) -> list[float]:
    """Seconds after which each of `misses` extents of `nbytes`, asked for at once, has been read.

    Parts that are under way together share the drive and end together, as many at a time as there are readers; few of
    them make a drive slower.
    """
    parts = -(-nbytes // PART_NBYTES)
    now, done = machine.first_read_s, 0
    times: list[float] = []
    while done < misses * parts:
        together = min(READERS, misses * parts - done)
        now += together * nbytes / parts / machine.drive_rate(together)
        done += together
        times += [now] * (done // parts - len(times))
    return times


def last_arrivals(misses: float, nbytes: int) -> float:
    """How many of `misses` extents of `nbytes`, asked for at once, end together with the last one: of several that are
    under way together any number may be left for the end, half of them on average."""
    together = max(1, READERS // -(-nbytes // PART_NBYTES))
    return min(misses, (1 + together) / 2)


def beside(machine: MachineSpec, compute: float, reading: float) -> tuple[float, float]:
    """(seconds of the processor, seconds it then waits) for work and reads of so many seconds each, begun together.

    While both go on, each is slowed by the other.
    """
    slowed = compute / machine.kernels_beside
    if slowed <= reading / machine.drive_beside:
        return slowed, reading - slowed * machine.drive_beside
    together = reading / machine.drive_beside
    return together + compute - together * machine.kernels_beside, 0.0


def lead(machine: MachineSpec, work: LayerWork, reads: int) -> tuple[list[float], float]:
    """(when each of `reads` reads ahead is there, seconds by which they slow attention).

    They begin before attention; the times are from its end on, 0 for what is there by then.
    """
    times = arrival_times(machine, reads, work.nbytes)
    if not times:
        return [], 0.0
    spent, _ = beside(machine, work.attention_s, max(0.0, times[-1] - work.gap_s))
    done = work.gap_s + spent * machine.drive_beside
    return [max(0.0, time - done) for time in times], spent - work.attention_s


def layer_time(machine: MachineSpec, work: LayerWork, demand: Demand) -> LayerTime:
    """One layer of decoding.

    The number of demands that need a read is taken as binomial, and so is that of the foretold among them: layers
    with many misses wait longer than the average says. Of reads for nothing a layer has one or none. What was
    foretold is there or arrives first; the drive then turns to what was not.
    """
    k, foretold = work.experts, demand.foretold
    useless = min(1.0, k * demand.wasted)
    computing = waiting = slowed = 0.0
    for absent in range(k + 1):
        for early in range(absent + 1 if foretold else 1):
            for wasted in (0, 1) if useless else (0,):
                chance = _binomial(k, absent, 1 - demand.hit) * _binomial(absent, early, foretold)
                chance *= useless if wasted else 1 - useless
                ahead, more = lead(machine, work, early + wasted)
                free = ahead[-1] if ahead else 0.0
                late = [time for time in ahead[:early] if time]
                asked = [free + time for time in arrival_times(machine, absent - early, work.nbytes)]
                misses = len(late) + len(asked)
                compute = work.compute_s / machine.kernels_beside if misses else work.compute_s
                times = [*late, *asked]
                waited = layer_seconds(misses, k - misses, compute=compute, arrivals=times, ahead=work.shared_s)[1]
                computing += chance * k * compute
                waiting += chance * waited
                slowed += chance * more
    return LayerTime(computing, waiting, slowed)


def _binomial(count: int, found: int, share: float) -> float:
    return float(comb(count, found) * share**found * (1 - share) ** (count - found))
