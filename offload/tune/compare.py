"""A run beside its prediction: where the difference comes from.

Owns the split of a gap into causes. Pure: it is given what was measured. The causes add up to the whole difference,
so nothing is left unexplained; the largest one is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offload.tune.cost import Cost
from offload.tune.gpu_cost import GpuCost

TOLERANCE = 0.2
"""Gaps above this share of the prediction are explained."""


_NAMES = {"hits": "hit rate"}
"""Of the causes whose name for people is another."""

_SLOWER = {
    "hits": "fewer hits than assumed: plan with --hits and a trace of your own",
    "drive": "the drive does not deliver its figure: something else uses it, or probe it again",
    "processor": "the processor does not reach its figures: other work, throttling, or probe it again",
    "link": "copies to the GPU do not reach the figure of the link: RAM that is not page-locked, or probe it again",
    "device": "the GPU, or what the host does for it, does not reach its figures: other work, throttling, or probe it "
    "again",
}
_FASTER = {
    "hits": "more hits than assumed: plan with --hits and a trace of your own",
    "drive": "the drive delivers more than its figure: probe it again",
    "processor": "the processor does more than its figures: they were measured beside other work; probe it again",
    "link": "copies to the GPU are faster than the figure of the link: probe it again",
    "device": "the GPU, or what the host does for it, does more than its figures: probe it again",
}


@dataclass(frozen=True)
class Measured:
    """One kind of forward pass as it ran, per token (decode) or per prompt (prefill)."""

    seconds: float
    stall_s: float
    read_nbytes: float


@dataclass(frozen=True)
class Comparison:
    """Seconds predicted and measured. The `causes` add up to measured - predicted.

    hits        what other hit rates than assumed cost
    drive       waiting for the drive beyond its figure, at the hit rate that was
    processor   where it computes: everything but waiting, against the rates of kernels and the overhead
    link        where a GPU computes: copies beyond the figure of the link, at the hit rate that was
    device      there, everything else: its kernels, and the host's work for it
    """

    what: str
    predicted_s: float
    measured_s: float
    causes: Mapping[str, float]

    @property
    def gap(self) -> float:
        """Speed measured against speed predicted: -0.25 is a quarter slower."""
        return self.predicted_s / self.measured_s - 1

    @property
    def cause(self) -> str:
        """The largest contribution that goes the way of the gap."""
        sign = 1 if self.measured_s >= self.predicted_s else -1
        return max(self.causes, key=lambda name: sign * self.causes[name])

    def line(self) -> str:
        """For people: the gap, and above the tolerance its causes."""
        head = f"{self.what}: predicted {_ms(self.predicted_s)}, measured {_ms(self.measured_s)} ({self.gap:+.0%})"
        if abs(self.gap) <= TOLERANCE:
            return head
        slower = self.measured_s >= self.predicted_s
        meaning = (_SLOWER if slower else _FASTER)[self.cause]
        parts = ", ".join(f"{_NAMES.get(name, name)} {_ms(part, True)}" for name, part in self.causes.items())
        return f"{head}; {parts}: {meaning}"

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return {
            "predicted_s": self.predicted_s,
            "measured_s": self.measured_s,
            "gap": self.gap,
            **{f"{name}_s": part for name, part in self.causes.items()},
            "cause": self.cause if abs(self.gap) > TOLERANCE else None,
        }


def compare(what: str, measured: Measured, assumed: Cost, actual: Cost) -> Comparison:
    """`assumed` is the cost at the expected hit rate, `actual` at the hit rate that was measured."""
    busy = assumed.experts_s + assumed.resident_s + assumed.overhead_s
    return Comparison(
        what,
        assumed.total_s,
        measured.seconds,
        {
            "hits": actual.stall_s - assumed.stall_s,
            "drive": measured.stall_s - actual.stall_s,
            "processor": measured.seconds - measured.stall_s - busy,
        },
    )


def compare_gpu(what: str, measured: Measured, assumed: GpuCost, actual: GpuCost, link: float = 1.0) -> Comparison:
    """The same where a GPU computes. `link`: seconds of the copies over those that the figure of the link gives."""
    hits = actual.total_s - assumed.total_s
    drive, copies = measured.stall_s - actual.stall_s, actual.link_s * (link - 1)
    device = measured.seconds - assumed.total_s - hits - drive - copies
    causes = {"hits": hits, "link": copies, "drive": drive, "device": device}
    return Comparison(what, assumed.total_s, measured.seconds, causes)


def _ms(seconds: float, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{seconds:{sign}.2f} s" if abs(seconds) >= 1 else f"{1000 * seconds:{sign}.1f} ms"
