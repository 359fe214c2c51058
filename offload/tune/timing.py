"""How long a call takes, as every part of the probe measures it."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any


def median_time(run: Callable[[], Any], seconds: float) -> float:
    """Seconds of one call, after one that is not counted; three calls at least."""
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return median(times)
