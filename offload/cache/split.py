"""Where the experts that VRAM does not hold are computed: copied to the device, or in place by the processor.

Owns the cost model of one layer and its running estimates of rates. Pure: it takes seconds that others have
measured and knows no tensors, streams or clocks.

Of n missing experts, m are computed in place and n - m copied. Both read host memory once, at the same time:
    T(m) = max( m * cpu,  (n - m) * link + kernel,  n * memory,  (resident + n - m) * kernel )
with the seconds that one expert takes on the processor, on the link to the device, in host memory and in a
kernel. The first two are what splitting balances, the third is what no split can beat.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

CPU_ROWS = 4
"""Tokens per expert up to which the processor takes no longer than for one: it waits for memory."""

_WEIGHT = 0.05
"""Share of a new measurement in an estimate."""


@dataclass(frozen=True)
class Rates:
    """Bytes per second at which expert weights pass through each part of the machine."""

    link: float = 25e9
    memory: float = 60e9
    cpu: float = 30e9
    kernel: float = 500e9


@dataclass(frozen=True)
class Division:
    """How many missing experts the processor computes, and how long the model thinks the layer takes."""

    in_place: int
    seconds: float


class SplitModel:
    """The rates of one device and its host, learned in service."""

    def __init__(self, expert_nbytes: int, rates: Rates = Rates()) -> None:
        self._nbytes = expert_nbytes
        self.rates = rates

    def observed(self, part: str, seconds: float, experts: int = 1) -> None:
        """`experts` experts took `seconds` in `part`: link, memory, cpu or kernel."""
        if seconds <= 0 or experts <= 0:
            return
        old = getattr(self.rates, part)
        rate = experts * self._nbytes / seconds
        # A stall of a hundred times the usual says something about the moment, not about the part.
        rate = min(max(rate, old / 4), old * 4)
        self.rates = replace(self.rates, **{part: old + _WEIGHT * (rate - old)})

    def seconds(self, resident: int, missing: int, in_place: int, rows: int = 1) -> float:
        """T of a layer with `resident` experts in VRAM and `missing` ones, `in_place` of them on the processor.

        `rows`: tokens per expert.
        """
        size, rates = self._nbytes, self.rates
        kernel, copied = size / rates.kernel, missing - in_place
        return max(
            in_place * size / rates.cpu * max(1.0, rows / CPU_ROWS),
            copied * size / rates.link + (kernel if copied else 0.0),
            missing * size / rates.memory,
            (resident + copied) * kernel,
        )

    def divide(self, resident: int, missing: int, rows: int = 1) -> Division:
        """The division of least time; of equals the one that copies most, since what is copied stays."""
        best = min(range(missing + 1), key=lambda m: (self.seconds(resident, missing, m, rows), m))
        return Division(best, self.seconds(resident, missing, best, rows))
