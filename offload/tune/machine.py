"""What a machine can do: sizes, rates and times of its parts.

Owns the figures and what stands for those nobody measured. Must not read them (`machine_file` does), measure them
(`probe` does) nor predict from them (`cost` does).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from operator import attrgetter, itemgetter
from statistics import fmean, median
from typing import Any

from offload.cache.policy import LEARNING
from offload.quant import get_codec
from offload.tiers.disk import READERS

KERNEL_SHARE = 0.85
"""Share of the RAM's read rate that the CPU kernels reach with one row, where no rate per format was measured."""

ATTENTION_SHARE = 0.25
"""Part of `gflops`, which is of small integers, that attention to earlier tokens reaches: its sums are of floats."""

ROWS = 16
"""Rows of the matrix products behind `gflops`: tokens per expert in a prefill chunk of 512, 256 experts, top-8."""

MANY_ROWS = 64
"""Rows from which on another one takes as much as each of those before: weights have been decoded for all of them."""


@dataclass(frozen=True)
class FormatRate:
    """What the CPU kernels do with one weight format, besides what a call takes with hardly any weights: that is part
    of a layer's time."""

    read: float
    """Weight bytes per second with one row of activations."""
    gflops: float
    """2 x multiply-adds per second with ROWS rows, in units of 1e9."""
    attention: float | None = None
    """Weight bytes per second of whole blocks of attention with one row: their matrices are smaller than experts."""
    gflops_many: float | None = None
    """The same as `gflops` with MANY_ROWS rows; `gflops` if unknown."""


PASS_TOKENS = 2048
"""Tokens of the passes behind the `gflops` of a GPU: a chunk of a prompt there."""

# What stands for figures of a GPU that nobody measured comes from steps and kernels recorded on an H200 and an H100
# (benchmarks/results/gpu.jsonl, gpu_speed.jsonl). They are one chip with two memories. So what both do alike (weights
# decoded per second, products of long passes) is bound by the chip, and what differs by the memory. A smaller GPU
# usually has more arithmetic for each byte; none has been measured.

GPU_LAYER_S = 65e-6
"""What layers of recorded steps take beyond the rates of kernels: 58 us on the H200, 72 on the H100. With that of
either, the steps of the other come out within 5%."""

GPU_PROMPT_LAYER_S = 2.4e-3
"""What prompts of 512 and of 2048 tokens took beyond products, when all experts were in VRAM, apart from what grows
with the tokens."""

GPU_TOKEN_S = 0.2e-3
GPU_SAMPLE_S = 7e-9
"""Per token, and per token and entry of the vocabulary: `probe` found 0.65 ms on the H100 with 32768 of them, most of
it sampling, which has become faster since: 0.85 ms with 129280."""

GPU_DECIDE_S = 0.3e-3
"""0.26 ms on a Zen 4 processor, the device being simulated; in recorded steps it is hidden behind the device."""

GPU_DECIDE_TOKEN_S = 1.2e-3
"""Greedy decoding on the H100 with slots for 95% of the experts of three layers took 3.1 ms instead of 1.85, and every
expert hit. `probe` divides it into 0.4 ms per layer and 0.7 per token there."""


@dataclass(frozen=True)
class KernelShare:
    """What kernels of one kind usually reach."""

    share: float
    """Of the memory's read rate with one row, where the memory binds."""
    weights: float
    """Weights decoded per second, where the chip binds."""
    gflops: float
    """Of a long pass, at most."""
    gflops_per_gb_s: float
    """The same on a smaller GPU: for each GB/s of its memory."""
    plain_share: float = 0.9
    """`share` of bf16, which is not decoded."""


EXPERTS = KernelShare(share=0.75, weights=2.9e12, gflops=105e3, gflops_per_gb_s=35)
"""Eight experts of one token: int4-g32 1.65 TB/s on both GPUs, int8-g128 0.63 and 0.76, fp8 0.64 of the memory."""

RESIDENT = KernelShare(share=0.5, weights=1.85e12, gflops=220e3, gflops_per_gb_s=75)
"""The matrices of attention one after the other: int8-g128 0.46 and 0.50 of the memory, int4-g32 1.0 TB/s on both."""

ATTENTION = KernelShare(share=0.1, weights=0.0, gflops=80e3, gflops_per_gb_s=27)
"""Scores and sums of a long pass, of which only `gflops` counts: 81 TFLOP/s with 512 tokens on the H200."""


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
    """Weight bytes per second of resident routed experts of one token in int4-g32; `experts` tells more."""
    experts: Mapping[str, FormatRate] = field(default_factory=dict)
    """Of routed experts by format: one token's, and those of a pass of PASS_TOKENS tokens."""
    resident: Mapping[str, FormatRate] = field(default_factory=dict)
    """The same of the matrices of attention."""
    attention_gflops: float | None = None
    """2 x multiply-adds per second of a long pass with the tokens before it, in units of 1e9."""
    layer_s: float = GPU_LAYER_S
    """Time per layer of one token that is neither weights nor copies: launches, small kernels, the router."""
    token_s: float | None = None
    """Time per token outside of the layers: logits on their way, sampling, Python."""
    prompt_layer_s: float = GPU_PROMPT_LAYER_S
    """The same per layer and chunk of a prompt."""
    decide_s: float = GPU_DECIDE_S
    """Time of the host per layer in which VRAM may lack experts. The device computes meanwhile."""
    decide_token_s: float = GPU_DECIDE_TOKEN_S
    """Time of the host per token where VRAM may lack experts, while the device has nothing to do."""

    def token_time(self, vocab_size: int) -> float:
        """`token_s`, else what it usually is with such a vocabulary."""
        return GPU_TOKEN_S + GPU_SAMPLE_S * vocab_size if self.token_s is None else self.token_s

    def expert_rate(self, codec: str) -> FormatRate:
        """The measured rate of routed experts in `codec`, else what the memory's rate allows."""
        rate = self.experts.get(codec) or self._usual(codec, EXPERTS)
        known = self.kernels if codec == "int4-g32" and codec not in self.experts else None
        return replace(rate, read=known or rate.read)

    def resident_rate(self, codec: str) -> FormatRate:
        """The same of resident matrices."""
        return self.resident.get(codec) or self._usual(codec, RESIDENT)

    def _usual(self, codec: str, kind: KernelShare) -> FormatRate:
        weights = get_codec(codec).nbytes(4096, 4096) / 4096**2  # bytes per weight
        read = self.read * (kind.plain_share if codec == "bf16" else kind.share)
        gflops = min(kind.gflops, kind.gflops_per_gb_s * self.read / 1e9)
        return FormatRate(min(read, kind.weights * weights), gflops)

    @property
    def past_gflops(self) -> float:
        """`attention_gflops`, else what a device with this memory usually reaches."""
        return self.attention_gflops or min(ATTENTION.gflops, ATTENTION.gflops_per_gb_s * self.read / 1e9)

    @property
    def measured(self) -> bool:
        """Whether its kernels have been measured in any format."""
        return bool(self.experts and self.resident)


ENGINE_TIMES = (
    *("layer_s", "miss_s", "foresee_s", "token_s", "learn_s"),
    *("prompt_layer_s", "prompt_token_s", "prompt_miss_s"),
)
"""What a run's passes take besides matrix products and waiting; fields of MachineSpec."""


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
    prompt_layer_s: float | None = None
    """`layer_s` of a chunk of a prompt, which is not computed in one call; `layer_s` if unknown."""
    prompt_token_s: float = 0.0
    """What each of its tokens adds to that, such as choosing its experts. Learning from it is the next token's."""
    foresee_s: float = 0.0
    """Time of the processor for a router that is applied early, besides its product."""
    token_s: float = 0.0
    """Time per token of decoding outside of the layers: its logits, sampling, Python."""
    learn_s: float = 0.0
    """Time that learning from a token of a prompt takes; the first token after the prompt waits for it."""
    plain: Mapping[str, float] = field(default_factory=dict)
    """All of ENGINE_TIMES under policies that learn nothing from tokens; empty if unknown, 0 for what it lacks."""
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

    @property
    def first_read_s(self) -> float:
        """Seconds until reads begin to arrive at the drive's rate. Rates measured by depth hold what a read takes."""
        return 0.0 if self.depths else self.drive_latency_s

    def format_rate(self, codec: str) -> FormatRate:
        """The measured rate of `codec`, else what the RAM's rate allows."""
        return self.formats.get(codec) or FormatRate(KERNEL_SHARE * self.ram_read, self.gflops)

    def under(self, policy: str) -> MachineSpec:
        """What the machine does under that policy. Its own times are those of the one that learns."""
        if policy == LEARNING or not self.plain:
            return self
        times: dict[str, Any] = dict.fromkeys(ENGINE_TIMES, 0.0) | dict(self.plain)
        return replace(self, **times)

    @property
    def past_gflops(self) -> float:
        """`attention_gflops`, else the part of `gflops` that its fp32 arithmetic usually reaches."""
        return self.attention_gflops or ATTENTION_SHARE * self.gflops


STUCK = 2.0
"""Times of the median that a measurement takes at least where something else had the processor or the drive."""


def mean(machines: Sequence[MachineSpec]) -> MachineSpec:
    """A machine that takes for everything the mean of the times that `machines` take; sizes are those of the first.

    A run meets slow moments as well, so they count. What took more than STUCK times the median does not: a second in
    which a virtual machine got no processor says nothing of the next one. All must have measured the same figures.
    """
    first = machines[0]

    def average(value: Callable[[Any], float | None], of: Sequence[Any] = machines) -> float | None:
        """The mean of times; None where one is unknown."""
        found = [each for each in map(value, of) if each is not None]
        return typical(found) if len(found) == len(of) else None

    def rate(value: Callable[[Any], float | None], of: Sequence[Any] = machines) -> float | None:
        """The mean of rates by that of their times."""
        found = [each for each in map(value, of) if each is not None]
        return 1 / typical([1 / each for each in found]) if len(found) == len(of) else None

    def rates(name: str) -> dict[str, float | None]:
        found = [getattr(machine, name) for machine in machines]
        return {key: rate(itemgetter(key), found) for key in found[0]}

    def formats(codec: str) -> FormatRate:
        found = [machine.formats[codec] for machine in machines]
        values: dict[str, Any] = {item.name: rate(attrgetter(item.name), found) for item in fields(FormatRate)}
        return FormatRate(**values)

    changed: dict[str, Any] = {name: rate(attrgetter(name)) for name in ("ram_read", "drive_read", "gflops")}
    changed |= {name: average(attrgetter(name)) for name in ("drive_latency_s", "drive_beside", "kernels_beside")}
    changed |= {name: average(attrgetter(name)) for name in ENGINE_TIMES}
    changed |= {name: rates(name) for name in ("ram_threads", "depths")}
    plain = [machine.plain for machine in machines]
    changed["plain"] = {name: average(itemgetter(name), plain) for name in first.plain}
    return replace(
        first,
        **changed,
        attention_gflops=rate(attrgetter("past_gflops")),
        formats={name: formats(name) for name in first.formats},
    )


def typical(values: Iterable[float]) -> float:
    """The mean of times without those of more than STUCK times their median."""
    values = list(values)
    longest = STUCK * median(values) if len(values) > 2 else max(values)
    return fmean(value for value in values if value <= longest)
