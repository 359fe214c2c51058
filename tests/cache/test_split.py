"""The cost model that divides missing experts between link and processor."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.cache.split import CPU_ROWS, Rates, SplitModel

rates = st.builds(Rates, *[st.floats(1e8, 1e12)] * 4)


@given(rates, st.integers(0, 8), st.integers(0, 12), st.integers(1, 64))
def test_no_division_is_better_than_the_chosen_one(rates, resident, missing, rows):
    model = SplitModel(25_000_000, rates)
    chosen = model.divide(resident, missing, rows)
    times = [model.seconds(resident, missing, m, rows) for m in range(missing + 1)]
    assert chosen.seconds == min(times) == times[chosen.in_place]
    assert all(time > chosen.seconds for time in times[: chosen.in_place])  # of equals, the one that copies most
    assert chosen.seconds >= missing * 25e6 / rates.memory  # memory is read once by either


def test_link_and_processor_share_the_work_in_proportion():
    model = SplitModel(10, Rates(link=100, memory=1e9, cpu=100, kernel=1e9))
    assert model.divide(0, 8).in_place == 4
    model = SplitModel(10, Rates(link=300, memory=1e9, cpu=100, kernel=1e9))
    assert model.divide(0, 8).in_place == 2
    assert model.divide(0, 0).in_place == 0


def test_where_memory_binds_everything_is_copied_because_it_stays():
    model = SplitModel(10, Rates(link=1000, memory=500, cpu=1000, kernel=1e9))
    assert model.divide(3, 5).in_place == 0


def test_many_rows_go_to_the_device():
    model = SplitModel(10, Rates(link=100, memory=1e9, cpu=100, kernel=1e9))
    assert model.divide(0, 8, rows=CPU_ROWS).in_place == 4
    assert model.divide(0, 8, rows=40 * CPU_ROWS).in_place == 0


def test_estimates_follow_what_is_seen_but_not_a_single_stall():
    model = SplitModel(1000, Rates(link=1e6))
    model.observed("link", 100.0)
    assert model.rates.link == pytest.approx(1e6, rel=0.05)
    for _ in range(200):
        model.observed("link", 1000 / 3e6)
    assert model.rates.link == pytest.approx(3e6, rel=0.01)
    before = model.rates
    model.observed("cpu", 0.0)
    model.observed("kernel", 1.0, 0)
    assert model.rates == before
