"""Compiling kernels for any architecture without a GPU, and what they will use of it.

Owns a `Launcher` that compiles exactly what `TritonKernels` would start: same arguments, same constants.
Tensors may be on torch's meta device, so true shapes cost no memory. What a kernel uses is read from its
cubin with the tool that comes with triton. Must not be used in a process that also runs kernels: it replaces
triton's notion of the current device.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from offload.kernels.triton.launch import Grid

ARCHITECTURES = (80, 86, 89, 90, 120)

SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
"""Shared memory in bytes that one program may use, by compute capability (CUDA programming guide)."""


@dataclass(frozen=True)
class Usage:
    """What one launch uses: per thread `registers` and `local_bytes` (spills and stack), per program the rest."""

    kernel: str
    architecture: int
    grid: Grid
    programs: int
    warps: int
    stages: int
    registers: int
    local_bytes: int
    shared_bytes: int


class Compiler:
    """A launcher that compiles for one architecture and notes the usage of every launch."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        self.launches: list[Usage] = []

    def __call__(self, kernel: Any, grid: Grid, *args: Any, **meta: Any) -> None:
        _pretend(self.architecture)
        compiled = kernel.warmup(*args, grid=grid, **meta)
        registers, local = _resources(compiled.asm["cubin"])
        data = compiled.metadata
        self.launches.append(
            Usage(
                kernel.__name__, self.architecture, grid, prod(grid), data.num_warps, data.num_stages,
                registers, local, data.shared,
            )
        )


def _pretend(architecture: int) -> None:
    """Let triton believe that the current device is of this architecture. Devices are numbered by architecture."""
    stand_in = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", architecture, 32),
        get_current_device=lambda: architecture,
        get_current_stream=lambda _: 0,
    )
    driver.set_active(stand_in)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of local memory per thread (stack included) of the kernel in a cubin."""
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]
