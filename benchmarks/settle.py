"""What programs that have ended still cost on a virtual machine, and the wait for its end.

A balloon that reports free pages hands the memory that a program leaves behind to the host, for half a minute where
it is 6 GB. Meanwhile the host takes 2 to 8% of the processor away from whoever runs then, and threads wait for each
other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil

SECONDS = 30.0
"""The host has got 6 GB by then."""

REPORTING = Path("/sys/module/page_reporting")
BALLOONS = Path("/sys/bus/virtio/drivers/virtio_balloon")


def settle() -> None:
    """Wait until the memory of programs that have ended has gone to the host, if it does on this machine."""
    if REPORTING.exists() and any(BALLOONS.glob("virtio*")):
        time.sleep(SECONDS)


def with_stolen(turn: Callable[[], float]) -> tuple[float, float]:
    """What `turn` gives, and the share of the processor's time that the host took away meanwhile."""
    begun, before = time.perf_counter(), _stolen()
    found = turn()
    cores = psutil.cpu_count() or 1
    return found, (_stolen() - before) / (cores * (time.perf_counter() - begun))


def _stolen() -> float:
    """Seconds, of all cores; 0 where the system does not count them."""
    return float(getattr(psutil.cpu_times(), "steal", 0.0))
