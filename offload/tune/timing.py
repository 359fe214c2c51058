"""How long a call takes, as every part of the probe measures it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def mean_time(run: Callable[[], Any], seconds: float) -> float:
    """Seconds of one call, the mean over `seconds` after a call that is not counted; three calls at least."""
    run()
    calls, begun = 0, time.perf_counter()
    while calls < 3 or time.perf_counter() - begun < seconds:
        run()
        calls += 1
    return (time.perf_counter() - begun) / calls


def beyond(taken: float, least: float) -> float:
    """Seconds of a call without those of the least one; a tenth at least, so that noise leaves something."""
    return max(taken - least, taken / 10)
