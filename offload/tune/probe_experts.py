"""Measuring routed experts of random weights: one row each, several, and many.

Owns the experts and the calls. What a call takes whatever its matrices is left out of their rates: `overhead` measures
the layers of a model whose matrices are too small to matter, and the same calls are part of those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from offload.kernels import FusedKernels, Kernels
from offload.quant import get_codec
from offload.store.layout import ExpertLayout, ExpertWeights
from offload.tune.arena import Arena, repeat
from offload.tune.attention_shapes import AttentionShapes
from offload.tune.machine import MANY_ROWS, ROWS, FormatRate
from offload.tune.probe_attention import block_time
from offload.tune.small_model import small_config
from offload.tune.timing import beyond, mean_time
from offload.types import align_up

TOGETHER = 8
"""Experts that one row uses."""

MOST_EXPERTS = 64

WAVES = ((1, TOGETHER), (ROWS, 2), (MANY_ROWS, 1))
"""(rows, experts) of the calls that are measured."""


@dataclass(frozen=True)
class LeastCalls:
    """Seconds of calls whose matrices are too small to matter, those of the model that `overhead` measures."""

    waves: Sequence[float]
    """Of routed experts, for each of WAVES."""
    attention: float
    """Of a block of attention; 0 where the backend has no such call."""


def measure_least(kernels: Kernels, seconds: float) -> LeastCalls:
    """Each for so many seconds, with code and data in the caches, as in the measured overhead."""
    config = small_config(1)
    layout = ExpertLayout(get_codec("int4-g32"), config.hidden_size, config.moe_intermediate_size)
    arena = Arena(1 << 20)
    experts = random_experts(layout, arena)[:TOGETHER]
    waves = [mean_time(expert_wave(kernels, experts, *wave), seconds) for wave in WAVES]
    attention = 0.0
    if isinstance(kernels, FusedKernels):
        attention = block_time(kernels, "bf16", AttentionShapes.of(config), arena, seconds)[1]
    return LeastCalls(waves, attention)


def measure_format(
    kernels: Kernels, layout: ExpertLayout, least: LeastCalls, arena: Arena, seconds: float
) -> FormatRate:
    """The rate of routed experts: one row for the bytes, several and many rows for the products."""
    experts = random_experts(layout, arena)
    parameters = 3 * layout.hidden_size * layout.moe_intermediate_size

    def taken(number: int) -> float:
        """Seconds of an expert in the call of this number."""
        rows, size = WAVES[number]
        return beyond(mean_time(expert_wave(kernels, experts, rows, size), seconds), least.waves[number]) / size

    def gflops(number: int) -> float:
        return max(1e-3, 2e-9 * WAVES[number][0] * parameters / taken(number))

    return FormatRate(layout.stride / taken(0), gflops(1), gflops_many=gflops(2))


def expert_wave(kernels: Kernels, experts: Sequence[ExpertWeights], rows: int, size: int) -> Callable[[], None]:
    """One call applies `size` of `experts` to `rows` rows each; every call has other experts than the last."""
    hidden = experts[0].layout.hidden_size
    x = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(0))
    partial = torch.zeros(rows * size, hidden)
    positions = [torch.arange(j, rows * size, size) for j in range(size)]
    first = 0

    def run() -> None:
        nonlocal first
        chosen = [(experts[(first + j) % len(experts)], positions[j]) for j in range(size)]
        first += size
        kernels.experts(x, chosen, size, partial)

    return run


def random_experts(layout: ExpertLayout, arena: Arena) -> list[ExpertWeights]:
    """As many as no cache holds, MOST_EXPERTS at most, all alike."""
    arena.clear()
    size = align_up(layout.stride)
    buffers = [arena.empty((size,), torch.uint8) for _ in range(arena.count(size, MOST_EXPERTS))]
    first = random_expert(layout, 0, buffers[0])
    for buffer in buffers[1:]:
        buffer.copy_(first.buffer)
    return [first, *(ExpertWeights(layout, buffer) for buffer in buffers[1:])]


def random_expert(layout: ExpertLayout, seed: int, buffer: torch.Tensor | None = None) -> ExpertWeights:
    """An expert of plausible weights, in `buffer` if given: every format's payload random, scales small and finite."""
    rng = torch.Generator().manual_seed(seed)
    if buffer is None:
        buffer = torch.empty(align_up(layout.stride), dtype=torch.uint8)
    for item in layout.fields:
        part = buffer[item.offset : item.offset + item.nbytes]
        if item.dtype.is_floating_point:
            # One row of random values repeated: drawing them all would take longer than the measurement.
            values = torch.randn(1021, generator=rng).mul(0.02).to(item.dtype).view(torch.uint8)
            if item.suffix == "weight_scale":
                values = torch.full((1021,), 0.01).to(item.dtype).view(torch.uint8)
        else:
            values = torch.randint(0, 256, (4099,), generator=rng, dtype=torch.uint8)
        repeat(values, part)
    return ExpertWeights(layout, buffer)
