"""What the tiers did: counters, a one-line summary, a dict for machines.

Owns the numbers that one run accumulates. Must not know who counts, nor print anything.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Self

from offload.types import format_size


@dataclass
class CacheEvents:
    """What the cache of one tier did: a replay of the same trace must reproduce it."""

    hits: int = 0
    misses: int = 0
    """Demands for which a read had to be issued."""
    evictions: int = 0
    prefetch_issued: int = 0
    prefetch_useful: int = 0
    """Prefetched experts that were resident when they were demanded."""
    prefetch_late: int = 0
    """Prefetched experts that were still being read when they were demanded."""
    prefetch_wasted: int = 0
    """Prefetched experts that left the tier without having been demanded."""
    prefetch_cancelled: int = 0

    @property
    def absent(self) -> int:
        """Demands whose expert had to be fetched, ahead of time or not."""
        return self.misses + self.prefetch_useful + self.prefetch_late

    def __add__(self, other: Self) -> Self:
        return type(self)(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def minus(self, earlier: Self) -> Self:
        """What happened since the copy `earlier` was taken."""
        return type(self)(**{name: value - getattr(earlier, name) for name, value in vars(self).items()})


@dataclass
class TierCounters(CacheEvents):
    """Events of one tier, and the reads behind them."""

    reads: int = 0
    bytes_read: int = 0
    read_s: float = 0.0
    """Time during which at least one read was under way."""
    stall_s: float = 0.0
    """Time during which the computation had nothing left to do but wait for this tier."""
    retries: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of demands that needed no read, 0..1; 0 without demands."""
        demands = self.hits + self.misses
        return self.hits / demands if demands else 0.0

    @property
    def bandwidth(self) -> float:
        """Bytes per second while reading; 0 without reads."""
        return self.bytes_read / self.read_s if self.read_s else 0.0

    @property
    def wasted_share(self) -> float:
        """Share of all reads (and bytes: each is one expert) that were speculative and for nothing, 0..1."""
        return self.prefetch_wasted / self.reads if self.reads else 0.0

    def as_dict(self) -> dict[str, object]:
        """Counters and the rates that follow from them."""
        rates = {"hit_rate": self.hit_rate, "bandwidth": self.bandwidth, "prefetch_wasted_share": self.wasted_share}
        return asdict(self) | rates


@dataclass
class Telemetry:
    """All counters of a run: one set per tier, and the stall time per MoE layer."""

    ram: TierCounters = field(default_factory=TierCounters)
    vram: TierCounters | None = None
    """The slots of all devices together; reads are copies from RAM. None without a device."""
    computed_in_ram: int = 0
    """Experts that the processor computed for a device."""
    layer_stall_s: list[float] = field(default_factory=list)
    choices: int = 0
    """Experts chosen while residents were preferred; 0 where routing is exact."""
    changed_choices: int = 0
    """Those among them that exact routing would not have chosen."""
    notes: list[str] = field(default_factory=list)
    """Things the user should be told once, such as why prefetching was switched off."""

    def note(self, text: str) -> None:
        """Remember `text` for the summary, once."""
        if text not in self.notes:
            self.notes.append(text)

    def as_dict(self) -> dict[str, object]:
        """Plain values for `--json`."""
        tiers = {"vram": self.vram, "ram": self.ram}
        return {
            **{name: tier.as_dict() for name, tier in tiers.items() if tier is not None},
            "computed_in_ram": self.computed_in_ram,
            "choices": self.choices,
            "changed_choices": self.changed_choices,
            "layer_stall_s": [round(s, 6) for s in self.layer_stall_s],
            "notes": list(self.notes),
        }

    def summary(self) -> str:
        """One line: hits, misses, bytes, bandwidth, waiting."""
        ram, vram, parts = self.ram, self.vram, []
        if vram is not None:
            parts += [
                f"VRAM {vram.hits} hit / {vram.misses} miss = {100 * vram.hit_rate:.1f}%",
                f"{format_size(vram.bytes_read)} copied"
                + (f" at {format_size(vram.bandwidth)}/s" if vram.read_s else ""),
            ]
        parts += [
            f"{'experts' if vram is None else 'RAM'} {ram.hits} hit / {ram.misses} miss = {100 * ram.hit_rate:.1f}%",
            f"{format_size(ram.bytes_read)} read" + (f" at {format_size(ram.bandwidth)}/s" if ram.read_s else ""),
            f"{ram.stall_s:.2f} s waiting",
        ]
        if ram.prefetch_issued:
            parts.append(
                f"prefetch {ram.prefetch_useful} useful, {ram.prefetch_late} late, {ram.prefetch_wasted} wasted "
                f"({ram.wasted_share:.1%} of the bytes)"
            )
        if self.choices:
            parts.append(f"{self.changed_choices / self.choices:.1%} of the choices changed to resident experts")
        return ", ".join(parts + self.notes)
