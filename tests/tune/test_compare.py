"""The causes of a gap add up to it, and the right one is named."""

from __future__ import annotations

import pytest

from offload.tune.compare import Measured, compare
from offload.tune.cost import Cost


def cost(stall: float, busy: float = 0.6) -> Cost:
    return Cost(experts_s=busy / 2, resident_s=busy / 3, stall_s=stall, overhead_s=busy / 6, read_nbytes=1e9)


@pytest.mark.parametrize(
    ("seconds", "stall", "actual", "cause"),
    [
        (1.6, 1.0, 1.0, "hits"),  # fewer hits than assumed: the waiting they imply
        (1.6, 1.0, 0.4, "drive"),  # the assumed hits, and a slower drive
        (2.0, 0.4, 0.4, "processor"),
        (0.62, 0.02, 0.02, "hits"),  # faster, because of more hits
        (0.5, 0.4, 0.4, "processor"),
        (1.9, 1.2, 0.5, "drive"),
    ],
)
def test_causes(seconds: float, stall: float, actual: float, cause: str) -> None:
    found = compare("decode", Measured(seconds, stall, 1e9), cost(0.4), cost(actual))
    assert sum(found.causes.values()) == pytest.approx(seconds - 1.0)
    assert found.cause == cause and found.to_dict()["cause"] == cause
    assert found.gap == pytest.approx(1.0 / seconds - 1)
    words = ("fewer hits", "does not") if seconds > 1 else ("more hits", "does more", "delivers more")
    assert any(word in found.line() for word in words) and "hit rate" in found.line()


def test_small_gaps_are_not_explained() -> None:
    found = compare("decode", Measured(1.1, 0.45, 1e9), cost(0.4), cost(0.4))
    assert found.to_dict()["cause"] is None
    assert found.line() == "decode: predicted 1.00 s, measured 1.10 s (-9%)"
