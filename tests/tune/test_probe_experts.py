"""Rates of routed experts: plausible experts, and no second count of what a call takes whatever its matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from offload.kernels import FusedKernels, select
from offload.quant import get_codec
from offload.store.layout import ExpertLayout
from offload.tune import probe_experts
from offload.tune.arena import Arena
from offload.tune.attention_shapes import AttentionShapes
from offload.tune.machine import MANY_ROWS, ROWS
from offload.tune.probe import FORMATS
from offload.tune.probe_attention import measure_attention
from offload.tune.probe_experts import TOGETHER, measure_format, measure_least, random_expert
from offload.tune.small_model import small_config
from offload.tune.timing import beyond

LAYOUT = ExpertLayout(get_codec("int4-g32"), 256, 128)


@pytest.mark.parametrize("codec", FORMATS)
def test_sample_experts_are_finite(codec: str) -> None:
    expert = random_expert(ExpertLayout(get_codec(codec), 256, 128), 3)
    for matrix in (expert.gate_proj, expert.up_proj, expert.down_proj):
        weight = matrix.dequantize().float()
        assert weight.isfinite().all() and 0 < weight.abs().mean() < 100


def test_rates_leave_out_what_every_call_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were every call to take 5 ms and its bytes and multiply-adds 8 more, these 8 would be the rate's."""
    kernels, taken = select("reference"), iter([0.005, 0.005, 0.005, 0.013, 0.013, 0.013])

    def mean_time(run: Callable[[], object], _: float) -> float:
        run()
        return next(taken)

    monkeypatch.setattr(probe_experts, "mean_time", mean_time)
    least = measure_least(kernels, 0.01)
    assert least.waves == [0.005, 0.005, 0.005] and least.attention == 0, "these kernels have no blocks of attention"
    rate = measure_format(kernels, LAYOUT, least, Arena(1 << 20), 0.01)
    assert rate.read == pytest.approx(TOGETHER * LAYOUT.stride / 0.008)
    flops = 2 * 3 * 256 * 128
    assert rate.gflops == pytest.approx(1e-9 * flops * ROWS * 2 / 0.008)
    assert rate.gflops_many == pytest.approx(1e-9 * flops * MANY_ROWS / 0.008)


def test_blocks_of_attention_leave_it_out_too() -> None:
    kernels = select("auto", 1)
    if not isinstance(kernels, FusedKernels):
        pytest.skip("no compiled kernels here")
    assert measure_least(kernels, 0.01).attention > 0
    shapes = replace(AttentionShapes.of(small_config(1)), q_lora_rank=None)
    arena = Arena(1 << 18)
    whole = measure_attention(kernels, "bf16", shapes, arena, 0.05)
    assert measure_attention(kernels, "bf16", shapes, arena, 0.05, least=1.0) > 2 * whole, "all but a tenth is left out"


def test_noise_leaves_something() -> None:
    assert beyond(13.0, 5.0) == 8.0
    assert beyond(5.0, 5.0) == beyond(5.0, 6.0) == 0.5
