"""Reads ahead within a layer, by hand: what is there in time, what is late, what they cost the processor."""

from __future__ import annotations

from dataclasses import replace

import pytest

from convert.footprint import Footprint
from offload.cache.lookahead import LEAST_ABSENT
from offload.tiers.disk import PART_NBYTES
from offload.tune.cost import ModelCost, decode_cost
from offload.tune.layer_clock import Demand, LayerWork, layer_time, lead
from offload.tune.machine import MachineSpec

# One read takes a second.
MACHINE = MachineSpec("test", 1 << 30, 1 << 30, 72e9, float(PART_NBYTES), threads=4, gflops=100.0, drive_latency_s=0.0)


def work(attention_s: float, experts: int = 1, shared_s: float = 0.0, gap_s: float = 0.0) -> LayerWork:
    return LayerWork(experts, PART_NBYTES, 0.1, shared_s, attention_s, gap_s)


def test_counters_of_a_run_become_shares() -> None:
    """A read ahead counts as a hit, in time or not; of ten demands two were read ahead, three not at all."""
    found = Demand.counted(hits=7, misses=3, issued=3, useful=1, late=1, prefetch_depth=2)
    assert (found.hit, found.ahead, found.wasted) == pytest.approx((0.5, 0.2, 0.1))
    assert found.foretold == pytest.approx(0.4) and found.reads == pytest.approx(0.6) and found.prefetch_depth == 2
    assert Demand.counted(0, 0) == Demand(0.0) and Demand(1.0).foretold == 0.0


@pytest.mark.parametrize(
    ("attention", "shared", "waited"), [(2.0, 0.0, 0.0), (0.75, 0.0, 0.25), (0.75, 0.2, 0.05), (0.0, 0.0, 1.0)]
)
def test_what_attention_does_not_hide_is_waited_for(attention: float, shared: float, waited: float) -> None:
    always = Demand(hit=0.0, ahead=1.0)
    assert layer_time(MACHINE, work(attention, shared_s=shared), always).waiting_s == pytest.approx(waited)
    never = layer_time(MACHINE, work(attention, shared_s=shared), Demand(0.0))
    assert never.waiting_s == pytest.approx(1.0 - shared)


def test_foretold_and_asked_for_share_the_drive() -> None:
    """Two reads begun half a second before the layer; the third begins when both are there."""
    times, slowed = lead(MACHINE, work(0.5), 2)
    assert times == pytest.approx([1.5, 1.5]) and slowed == 0.0
    found = layer_time(MACHINE, work(0.5, experts=2), Demand(hit=0.0, ahead=0.5))
    # None, one or both of two are foretold: both are there after 2; one after 0.5 and, the first being computed, the
    # other after 1.5, in two cases of four; both after 1.5.
    assert found.waiting_s == pytest.approx(0.25 * 2 + 0.5 * (0.5 + 0.9) + 0.25 * 1.5)


def test_reads_for_nothing_keep_the_drive_busy() -> None:
    asked = layer_time(MACHINE, work(0.25), Demand(0.0)).waiting_s
    useless = layer_time(MACHINE, work(0.25), Demand(0.0, wasted=1.0)).waiting_s
    assert (asked, useless) == pytest.approx((1.0, 1.75))
    assert layer_time(MACHINE, work(0.25), Demand(1.0, wasted=1.0)).waiting_s == 0.0


def test_reads_ahead_slow_attention() -> None:
    """Beside reads the kernels do half, the drive four fifths: 0.6 s of attention take 1.1 s while one read goes on."""
    both = replace(MACHINE, kernels_beside=0.5, drive_beside=0.8)
    times, slowed = lead(both, work(0.6), 1)
    assert (times, slowed) == (pytest.approx([0.04]), pytest.approx(0.6))  # 1.2 s, in which 0.96 of the read is done
    times, slowed = lead(both, work(0.6, gap_s=0.5), 1)
    assert times == [0.0] and slowed == pytest.approx(0.5 / 0.8 * 0.5)
    layer = layer_time(both, work(0.6), Demand(0.0, ahead=1.0))
    assert layer.slowed_s == pytest.approx(0.6) and layer.experts_s == pytest.approx(0.2)
    # There in time, it is computed beside nothing.
    assert layer_time(both, work(3.0), Demand(0.0, ahead=1.0)).experts_s == pytest.approx(0.1)
    assert layer_time(both, work(0.6), Demand(0.0)).slowed_s == 0.0


def test_what_is_read_ahead_is_waited_for_less(v3: dict[str, Footprint]) -> None:
    model = ModelCost.of(v3["int4"])
    machine = replace(MACHINE, drive_read=7e9, ram_read=72e9, gflops=1000.0)
    costs = [decode_cost(model, machine, Demand(0.8, ahead=part / 50)) for part in range(11)]
    stalls = [cost.stall_s for cost in costs]
    assert stalls == sorted(stalls, reverse=True) and stalls[-1] < 0.8 * stalls[0]
    assert len({cost.read_nbytes for cost in costs}) == 1
    wasteful = decode_cost(model, replace(machine, miss_s=1e-4), Demand(0.8, wasted=0.05))
    assert wasteful.read_nbytes == pytest.approx(1.25 * costs[0].read_nbytes)
    assert wasteful.overhead_s == pytest.approx(464 * 0.25 * 1e-4)


def test_early_routers_cost_something_where_they_are_applied(v3: dict[str, Footprint]) -> None:
    model = ModelCost.of(v3["int4"])
    machine = replace(MACHINE, foresee_s=2e-4)
    none, one, two = (decode_cost(model, machine, Demand(0.8, prefetch_depth=depth)).overhead_s for depth in range(3))
    assert none == 0.0 and two == pytest.approx(2 * one)
    assert one == pytest.approx(58 * (2e-4 + 2 * 256 * 7168 / (0.85 * 72e9)))
    little = Demand(1 - 0.9 * LEAST_ABSENT / 8, prefetch_depth=1)
    assert decode_cost(model, machine, little).overhead_s == 0.0
