"""What a machine can do: sizes, rates and times of its parts.

Owns the figures and what stands for those nobody measured. Must not read them (`machine_file` does), measure them
(`probe` does) nor predict from them (`cost` does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import fmean, harmonic_mean

from offload.tiers.disk import READERS

KERNEL_SHARE = 0.85
"""Share of the RAM's read rate that the CPU kernels reach with one row, where no rate per format was measured."""

ATTENTION_SHARE = 0.25
"""Part of `gflops`, which is of small integers, that attention to earlier tokens reaches: its sums are of floats."""

ROWS = 16
"""Rows of the matrix products behind `gflops`: tokens per expert in a prefill chunk of 512, 256 experts, top-8."""


@dataclass(frozen=True)
class FormatRate:
    """What the CPU kernels do with one weight format."""

    read: float
    """Weight bytes per second with one row of activations."""
    gflops: float
    """2 x multiply-adds per second with ROWS rows, in units of 1e9."""
    attention: float | None = None
    """Weight bytes per second of whole blocks of attention with one row: their matrices are smaller than experts."""


@dataclass(frozen=True)
class Gpu:
    """A graphics card."""

    name: str
    vram: int
    read: float
    """Bytes per second of its memory."""
    h2d: float
    """Bytes per second from pinned RAM."""
    free: int | None = None
    """Bytes that were free when it was measured. This and what follows is measured by `probe`."""
    h2d_pageable: float | None = None
    """Bytes per second from RAM that is not pinned."""
    h2d_with_reads: float | None = None
    """Bytes per second from pinned RAM while the processor reads RAM with all threads."""
    ram_with_copies: float | None = None
    """Bytes per second that the processor reads meanwhile."""
    kernels: float | None = None
    """Weight bytes per second of resident routed experts of one token in int4-g32."""


@dataclass(frozen=True)
class MachineSpec:
    """Rates in bytes per second, sizes in bytes."""

    name: str
    ram_total: int
    ram_available: int
    ram_read: float
    drive_read: float
    threads: int
    gflops: float
    attention_gflops: float | None = None
    """2 x multiply-adds per second of one row with the tokens before it, in units of 1e9."""
    drive_latency_s: float = 1e-4
    drive_free: int | None = None
    formats: Mapping[str, FormatRate] = field(default_factory=dict)
    encode: float | None = None
    """Source bytes per second that conversion requantizes."""
    gpu: Gpu | None = None
    download: float | None = None
    layer_s: float = 0.0
    """Time per layer and forward pass that is not matrix products: small kernels, routing, Python."""
    miss_s: float = 0.0
    """Time of the processor for every expert that is read."""
    prompt_miss_s: float | None = None
    """The same in a prompt, which asks for many at once; `miss_s` if unknown."""
    foresee_s: float = 0.0
    """Time of the processor for a router that is applied early, besides its product."""
    warnings: tuple[str, ...] = ()
    drive_beside: float = 1.0
    """Share of the drive's rate that remains while the kernels are busy."""
    kernels_beside: float = 1.0
    """Share of the kernels' rates that remains while the drive is."""
    depths: Mapping[str, float] = field(default_factory=dict)
    """Drive rate by number of reads under way."""
    ram_threads: Mapping[str, float] = field(default_factory=dict)
    """RAM rate by number of threads."""

    def drive_rate(self, parallel: float) -> float:
        """Bytes per second with `parallel` reads under way, at most as many as a run has; `drive_read` if unknown."""
        known = sorted((int(depth), rate) for depth, rate in self.depths.items() if int(depth) < READERS)
        if not known or parallel >= READERS:
            return self.drive_read
        known.append((READERS, self.drive_read))
        for (low, slower), (high, faster) in pairwise(known):
            if parallel < high:
                return slower + (faster - slower) * max(0.0, parallel - low) / (high - low)
        return self.drive_read

    def format_rate(self, codec: str) -> FormatRate:
        """The measured rate of `codec`, else what the RAM's rate allows."""
        return self.formats.get(codec) or FormatRate(KERNEL_SHARE * self.ram_read, self.gflops)

    @property
    def past_gflops(self) -> float:
        """`attention_gflops`, else the part of `gflops` that its fp32 arithmetic usually reaches."""
        return self.attention_gflops or ATTENTION_SHARE * self.gflops


def mean(machines: Sequence[MachineSpec]) -> MachineSpec:
    """A machine that takes for everything the mean of the times that `machines` take; sizes are those of the first.

    All must have measured the same figures.
    """
    first = machines[0]

    def formats(name: str) -> FormatRate:
        found = [machine.formats[name] for machine in machines]
        attention = [each.attention for each in found if each.attention]
        return FormatRate(
            harmonic_mean([each.read for each in found]),
            harmonic_mean([each.gflops for each in found]),
            harmonic_mean(attention) if attention else None,
        )

    def rate(name: str) -> float:
        return harmonic_mean([getattr(machine, name) for machine in machines])

    def rates(name: str) -> dict[str, float]:
        found = [getattr(machine, name) for machine in machines]
        return {key: harmonic_mean([each[key] for each in found]) for key in found[0]}

    def average(name: str) -> float:
        return fmean(getattr(machine, name) for machine in machines)

    return replace(
        first,
        ram_read=rate("ram_read"),
        ram_threads=rates("ram_threads"),
        drive_read=rate("drive_read"),
        depths=rates("depths"),
        gflops=rate("gflops"),
        attention_gflops=rate("past_gflops"),
        formats={name: formats(name) for name in first.formats},
        drive_latency_s=average("drive_latency_s"),
        drive_beside=average("drive_beside"),
        kernels_beside=average("kernels_beside"),
        layer_s=average("layer_s"),
        miss_s=average("miss_s"),
        prompt_miss_s=None if first.prompt_miss_s is None else average("prompt_miss_s"),
        foresee_s=average("foresee_s"),
    )
