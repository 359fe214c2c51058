"""The Triton kernels run numerically without a GPU: the checks beside this file, under Triton's interpreter.

The interpreter is chosen when a kernel's module is imported, so every file of checks has a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
CHECKS = sorted(path.name for path in HERE.glob("check_*.py"))
ENGINE = "engine_checks.py"


def run_checks(file: str, environment: dict[str, str], selection: str) -> None:
    """Run a file of checks in another process; raises AssertionError with its output if one fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / file), "-m", selection]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.parametrize("file", CHECKS)
def test_under_the_interpreter(file: str) -> None:
    run_checks(file, {"TRITON_INTERPRET": "1"}, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("file", ["check_experts.py", "check_linear.py", ENGINE])
def test_under_the_interpreter_in_all_sizes(file: str) -> None:
    run_checks(file, {"TRITON_INTERPRET": "1"}, "slow")
