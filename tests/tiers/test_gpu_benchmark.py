"""The GPU benchmark runs where there is no GPU, small and on the simulated device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_benchmark_runs_and_its_hits_are_those_that_were_planted():
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--layers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout)
    assert numbers["simulated"]
    assert numbers["plan"]["slots"] == 16
    assert [row["hits"] for row in numbers["decode"]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert numbers["prefill"]["copied_experts"] > 0
    assert 0 < numbers["peak_vram_bytes"] <= numbers["plan"]["total"]
