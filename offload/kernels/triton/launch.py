"""How kernels are started. Owns the one place where a grid meets a device; tests and tools put their own there.

A `Launcher` is called with a kernel, its grid, its arguments and its constants. `start` runs the kernel;
`offload.kernels.triton.compiled` only compiles it, for any architecture, without a GPU.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

Grid = tuple[int, ...]


class Launcher(Protocol):
    """Starts `kernel` over `grid`; `meta` holds its constants, num_warps and num_stages."""

    def __call__(self, kernel: Any, grid: Grid, *args: Any, **meta: Any) -> None: ...


def start(kernel: Any, grid: Grid, *args: Any, **meta: Any) -> None:
    """Queue the kernel on the current stream of the device that holds its tensors; the first argument is one."""
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **meta)
