"""Run the GPU kernels under compute-sanitizer: `python tests/kernels/triton/sanitize.py [memcheck|racecheck]`.

Both tools when no name is given. Needs a CUDA device and compute-sanitizer (part of the CUDA toolkit). Exits with
1 when a tool finds something or a check fails. PyTorch's caching allocator is off, so that memcheck sees every
tensor's true bounds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
TOOLS = ("memcheck", "racecheck")


def check(tool: str, file: Path) -> int:
    """Exit status of the checks in `file` under `tool`."""
    print(f"== {tool} {file.name}", flush=True)
    sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--target-processes", "all"]
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)]
    tests += ["-m", "(cuda or not cuda) and not slow"]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(sanitizer + tests, env=environment, check=False).returncode


def main() -> int:
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: there is nothing to run the kernels on")
    if shutil.which("compute-sanitizer") is None:
        sys.exit("compute-sanitizer is not on PATH: install the CUDA toolkit")
    return max(check(tool, file) for tool in sys.argv[1:] or TOOLS for file in sorted(HERE.glob("check_*.py")))


if __name__ == "__main__":
    sys.exit(main())
