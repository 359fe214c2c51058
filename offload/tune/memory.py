"""How much RAM there is for this process.

Owns looking at the machine and at the control groups that limit the process. Must not decide what it is used for.
"""

from __future__ import annotations

import ctypes
import gc
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Memory:
    """Bytes. `total` is what could ever be had, `available` what is free now; the smaller of machine and group."""

    total: int
    available: int
    limited_by_group: bool = False


def memory(root: Path = Path("/")) -> Memory:
    """The memory of this machine, or of the control group (v1 or v2) in which the process runs."""
    machine = psutil.virtual_memory()
    total, available, limited = int(machine.total), int(machine.available), False
    for folder, limit_name, usage_name in _groups(root):
        limit, usage = _number(folder / limit_name), _number(folder / usage_name)
        if limit is None or limit >= machine.total:
            continue
        limited = limited or limit < total
        total = min(total, limit)
        # What the group holds of files can be dropped, so only what is not cached counts as used.
        used = (usage or 0) - _cached(folder / "memory.stat")
        available = min(available, max(0, limit - used))
    return Memory(total, available, limited)


def process_nbytes() -> int:
    """RAM that the process takes now, in bytes, without what it has freed: the C library keeps a hundred megabytes of
    a model that was closed, of which the next one would be given as many slots less."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc
        trim(0)
    return int(psutil.Process().memory_info().rss)


def _groups(root: Path) -> list[tuple[Path, str, str]]:
    """Folders of the groups above the process, each with the names of its limit and its usage."""
    found = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # Inside a container the path is that of the host, and the container's own group is the base.
        folder = base / path.lstrip("/")
        while True:
            found.append((folder, *names))
            if folder == base or base not in folder.parents:
                break
            folder = folder.parent
    return found


def _cached(stat: Path) -> int:
    values = dict(line.split(maxsplit=1) for line in _text(stat).splitlines() if " " in line)
    return int(values.get("total_inactive_file", values.get("inactive_file", 0)))


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
