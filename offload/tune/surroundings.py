"""What slows this machine down without showing in a figure: warnings for people.

Owns looking at the system. Linux tells most; where a file is missing there is no warning.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from offload.types import format_size

LITTLE_DISK_NBYTES = 400 * 10**9
SLOW_DRIVE = 1e9
UNSTEADY = 1.3
"""Largest over least rate of the passes without a word."""
OTHERS_SHARE = 0.1
"""Share of the cores that other work may take without a word."""


def warnings(
    folder: Path,
    *,
    kernels: str,
    drive_read: float,
    buffered: bool,
    others: float,
    paces: Mapping[str, Sequence[float]] | None = None,
    root: Path = Path("/"),
) -> tuple[str, ...]:
    """One line for each thing that hurts. `others`: see `OtherWork`. `paces`: by name, a rate in every pass of the
    measurement. `root` is where the system's files begin.
    """
    found = [
        _others(others),
        *(_unsteady(name, rates) for name, rates in (paces or {}).items()),
        _swap(),
        _memlock(),
        _little_disk(folder),
        _wsl(root),
        _governor(root),
        _numa(root),
        _kernels(kernels),
        _drive(drive_read, buffered, folder),
    ]
    return tuple(line for line in found if line)


class OtherWork:
    """What other processes, and other guests of the same host, take of the processor from now on.

    The load average does not tell: it counts this process, what has just ended, and tasks that wait for a drive.
    """

    def __init__(self) -> None:
        self._begun = time.perf_counter(), _busy_s(), _own_s()

    def cores(self) -> float:
        """Cores they kept busy since, on average; 0 or more."""
        began, busy, own = self._begun
        elapsed = time.perf_counter() - began
        return max(0.0, (_busy_s() - busy - (_own_s() - own)) / elapsed) if elapsed else 0.0


def _busy_s() -> float:
    """Processor seconds of everything since the system's start."""
    times = psutil.cpu_times()
    # Linux counts a guest's time to user as well; waiting for a drive is idle time.
    idle = ("idle", "iowait", "guest", "guest_nice")
    return float(sum(value for name, value in times._asdict().items() if name not in idle))


def _own_s() -> float:
    """Processor seconds of this process and of those it has waited for."""
    times = psutil.Process().cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def _others(busy: float) -> str:
    cores = psutil.cpu_count() or 1
    if busy < OTHERS_SHARE * cores:
        return ""
    return (
        f"while this was measured, other work kept {busy:.1f} of {cores} cores busy: figures are too low; measure "
        "again on an idle machine"
    )


def _unsteady(what: str, rates: Sequence[float]) -> str:
    low, high = min(rates), max(rates)
    if high < UNSTEADY * low:
        return ""
    return (
        f"{what} changed by {high / low - 1:.0%} while this was measured (other work, other guests on the same cores, "
        "clock or heat): no forecast can be closer"
    )


def _swap() -> str:
    used = psutil.swap_memory().used
    if used < 1 << 28:
        return ""
    return f"{format_size(used)} are swapped out: leave more RAM free, or expert slots will be swapped to the drive"


def _memlock() -> str:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY or limit >= psutil.virtual_memory().total // 2:
        return ""
    return f"locked memory is limited to {format_size(limit)}: pinned slots for a GPU need more (ulimit -l)"


def _little_disk(folder: Path) -> str:
    free = psutil.disk_usage(str(folder)).free
    if free >= LITTLE_DISK_NBYTES:
        return ""
    return f"{format_size(free)} are free on the drive: DeepSeek-V3 in 4.5 bits takes {format_size(388 * 10**9)}"


def _wsl(root: Path) -> str:
    if "microsoft" not in _text(root / "proc/version").lower():
        return ""
    return "this is WSL2: drives below /mnt are many times slower; keep the store inside the Linux file system"


def _governor(root: Path) -> str:
    governor = _text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip()
    preference = _text(root / "sys/devices/system/cpu/cpu0/cpufreq/energy_performance_preference").strip()
    if governor == "powersave" and preference in ("", "power", "balance_power"):
        return "the processor's governor is powersave: set it to performance while generating"
    return ""


def _numa(root: Path) -> str:
    nodes = len(list((root / "sys/devices/system/node").glob("node[0-9]*")))
    if nodes < 2:
        return ""
    return f"{nodes} NUMA nodes: memory of the other node is slower; run under numactl --interleave=all"


def _kernels(name: str) -> str:
    return "" if name == "native" else "the compiled kernels are not available: rates are those of the torch reference"


def _drive(read: float, buffered: bool, folder: Path) -> str:
    if buffered:
        return f"{folder}: direct I/O is refused, so the figure for the drive may be that of the page cache"
    if read < SLOW_DRIVE:
        return f"the drive reads {read / 1e9:.2f} GB/s: no NVMe drive, or one behind a slow link (check with lspci -vv)"
    return ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
