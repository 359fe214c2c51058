"""What one generation did: one line for people, one dict for machines.

Owns the difference between two readings of the counters. Must not measure anything but peak memory.
"""

from __future__ import annotations

import copy
import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from offload.engine.backend import Backend
from offload.engine.request import GenerationResponse
from offload.telemetry import Telemetry, TierCounters
from offload.tune.budget import RamPlan
from offload.tune.compare import Comparison
from offload.tune.gpu_cost import GpuDemand
from offload.tune.layer_clock import Demand
from offload.tune.vram_budget import VramPlan


@dataclass(frozen=True)
class Snapshot:
    """Counters at one moment."""

    ram: TierCounters
    vram: TierCounters | None
    layer_stall_s: tuple[float, ...]
    computed_in_ram: int
    choices: int
    changed_choices: int

    @classmethod
    def take(cls, telemetry: Telemetry) -> Snapshot:
        ram, vram, stall = copy.copy(telemetry.ram), copy.copy(telemetry.vram), tuple(telemetry.layer_stall_s)
        return cls(ram, vram, stall, telemetry.computed_in_ram, telemetry.choices, telemetry.changed_choices)


@dataclass
class Phase(TierCounters):
    """One part of a run, prompt or decoding: what the RAM tier counted meanwhile, and what passed."""

    tokens: int = 0
    seconds: float = 0.0
    vram: TierCounters | None = None
    """What the slots of the devices counted: reads are copies from RAM. None where the processor computes."""
    computed_in_ram: int = 0
    """Experts that the processor computed for a device."""

    @classmethod
    def between(cls, before: Snapshot, after: Snapshot, tokens: int, seconds: float) -> Phase:
        """The part between two readings."""
        return cls(
            **vars(after.ram.minus(before.ram)),
            tokens=tokens,
            seconds=seconds,
            vram=after.vram.minus(before.vram) if after.vram and before.vram else None,
            computed_in_ram=after.computed_in_ram - before.computed_in_ram,
        )

    @property
    def tok_s(self) -> float:
        return self.tokens / self.seconds

    def demand(self, prefetch_depth: int) -> Demand:
        """What became of the demands; `prefetch_depth`: layers ahead for which routers were applied early."""
        ahead = self.prefetch_issued, self.prefetch_useful, self.prefetch_late
        return Demand.counted(self.hits, self.misses, *ahead, prefetch_depth)

    def gpu_demand(self, prefetch_depth: int, paged: bool) -> GpuDemand:
        """The same of decoding with devices; `paged`: whether any expert lacks a slot there."""
        assert self.vram is not None, "devices have counters"
        demands = max(1, self.vram.hits + self.vram.misses + self.computed_in_ram)
        ahead = self.prefetch_useful + self.prefetch_late
        absent = min(demands, self.misses + ahead)
        wasted = max(0, self.prefetch_issued - ahead)
        below = Demand(1 - absent / demands, min(ahead, absent) / demands, wasted / demands, prefetch_depth)
        return GpuDemand(self.vram.hits / demands, below, paged)


@dataclass(frozen=True)
class RunSummary:
    """A finished (or stopped) generation with its share of the counters."""

    response: GenerationResponse
    telemetry: Telemetry
    plan: RamPlan
    vram_plans: Sequence[VramPlan]
    peak_ram_bytes: int
    peak_vram_bytes: int
    comparisons: tuple[Comparison, ...] = ()
    """Beside the plan, where there is a machine file."""

    @classmethod
    def of(cls, response: GenerationResponse, before: Snapshot, now: Telemetry, backend: Backend) -> RunSummary:
        """What happened since `before`."""
        spent = Telemetry(
            ram=now.ram.minus(before.ram),
            vram=now.vram.minus(before.vram) if now.vram and before.vram else None,
            layer_stall_s=[b - a for a, b in zip(before.layer_stall_s, now.layer_stall_s, strict=True)],
            computed_in_ram=now.computed_in_ram - before.computed_in_ram,
            choices=now.choices - before.choices,
            changed_choices=now.changed_choices - before.changed_choices,
            notes=list(now.notes),
        )
        return cls(response, spent, backend.plan, backend.vram, peak_ram(), backend.peak_vram())

    def line(self) -> str:
        """Speed, hit rate, bytes."""
        r = self.response
        speed = [
            f"prefill {r.prompt_tokens} tokens" + (f" at {r.prefill_tok_s:.1f} tok/s" if r.prefill_tok_s else ""),
            f"decode {r.completion_tokens} tokens" + (f" at {r.decode_tok_s:.1f} tok/s" if r.decode_tok_s else ""),
        ]
        busy = [f"drive busy {self.drive_busy:.0%} of the time"] if self.telemetry.ram.reads else []
        return " | ".join([", ".join(speed), ", ".join([self.telemetry.summary(), *busy])])

    @property
    def drive_busy(self) -> float:
        """Share of the run's time during which the drive had something to read, 0..1."""
        r = self.response
        seconds = (r.ttft_s or 0.0) + (max(0, r.completion_tokens - 1) / r.decode_tok_s if r.decode_tok_s else 0.0)
        return min(1.0, self.telemetry.ram.read_s / seconds) if seconds else 0.0

    def lines(self) -> Iterator[str]:
        """What was done, then how it compares with the plan."""
        yield self.line()
        yield from (comparison.line() for comparison in self.comparisons)

    def to_dict(self) -> dict[str, Any]:
        """Everything `--json` prints."""
        ram, vram = self.telemetry.ram, self.telemetry.vram
        tiers = {"ram": ram} if vram is None else {"vram": vram, "ram": ram}
        return {
            **self.response.to_dict(),
            "hits": {name: tier.hits for name, tier in tiers.items()},
            "misses": {name: tier.misses for name, tier in tiers.items()},
            "bytes_read": {"disk": ram.bytes_read} | ({"link": vram.bytes_read} if vram else {}),
            "link_busy": {"disk": round(self.drive_busy, 4)},
            "telemetry": self.telemetry.as_dict(),
            "plan": {**asdict(self.plan), "total": self.plan.total},
            "vram_plans": [
                {**asdict(plan), "layers": [*plan.layers], "total": plan.total} for plan in self.vram_plans
            ],
            "peak_ram_bytes": self.peak_ram_bytes,
            "peak_vram_bytes": self.peak_vram_bytes,
            "compared": {item.what: item.to_dict() for item in self.comparisons},
        }


def peak_ram() -> int:
    """Largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
