"""Recorded rows: command, commit, machine, versions, numbers."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def append(benchmark: str, command: str, numbers: dict[str, Any]) -> None:
    """Append one row to benchmarks/results/<benchmark>.jsonl."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    row = {
        "benchmark": benchmark,
        "command": re.sub(r"(?<=\s)/\S*/", "", command),  # folders of this machine by their names alone
        "commit": commit.stdout.strip(),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "ram_bytes": _ram()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "numbers": numbers | {"load_average": os.getloadavg()[0]},
    }
    with (ROOT / "benchmarks" / "results" / f"{benchmark}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def processor() -> str:
    """Model name of the CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _ram() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
