"""What `--prefer-resident` prefers, and how it counts."""

from __future__ import annotations

import numpy as np

from offload.cache.decisions import Decision
from offload.cache.policy import CacheShape, create_policy
from offload.cache.preference import Preference
from offload.cache.residency import Residency

SHAPE = CacheShape(layers=2, experts=8, top_k=2)


def make(*resident: int) -> tuple[Residency, Preference]:
    """Experts `resident` of layer 1 are in their slots."""
    residency = Residency(create_policy("lru", SHAPE), 10, floor=2)
    residency.begin_step([1])

    def arrive(decision: Decision) -> None:
        for load in decision.loads:
            residency.loaded(load.slot)

    residency.serve(1, [list(resident)], arrive, lambda decision: None)
    return residency, Preference(residency, 0.25)


def test_residents_get_the_lead_only_when_something_is_missing() -> None:
    _, preference = make(2, 5)
    assert preference.of(1, [[5, 2]]) is None
    lead = preference.of(1, [[5, 3]])
    assert lead is not None and lead.dtype == np.float32
    assert lead.tolist() == [0, 0, 0.25, 0, 0, 0.25, 0, 0]
    assert preference.of(0, [[5, 3]]).tolist() == [0.0] * 8  # type: ignore[union-attr]


def test_a_read_under_way_counts_as_resident() -> None:
    residency, preference = make(2)
    load = residency.prefetch(1, 7)
    assert load is not None and residency.is_loading(load.slot)
    lead = preference.of(1, [[0, 1]])
    assert lead is not None and np.flatnonzero(lead).tolist() == [2, 7]
    residency.cancelled(load.slot)
    lead = preference.of(1, [[0, 1]])
    assert lead is not None and np.flatnonzero(lead).tolist() == [2]


def test_changes_are_counted_per_choice() -> None:
    _, preference = make(2, 5)
    preference.of(1, [[5, 2]])
    preference.executed([[5, 2]])
    preference.of(1, [[0, 3]])
    preference.executed([[2, 0]])
    preference.of(1, [[0, 3]])
    preference.executed([[3, 0]])  # another order is no change
    preference.executed([[6, 7]])  # nothing was asked before it
    assert (preference.choices, preference.changed) == (6, 1)


def test_a_pass_over_as_many_choices_as_experts_is_left_alone() -> None:
    _, preference = make(2, 5)
    assert preference.of(1, [[0, 1]] * 4) is None and preference.choices == 0
    assert preference.of(1, [[0, 1]] * 3) is not None and preference.choices == 6
