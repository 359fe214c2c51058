"""How kernels are started. Owns the one place where a grid meets a device; tests and tools put their own there.

A `Launcher` is called with a kernel, its grid, its arguments and its constants. `start` runs the kernel;
`offload.kernels.triton.compiled` only compiles it, for any architecture, without a GPU.

Triton looks a compiled kernel up by the text of all its options and takes longer for it than most kernels of a
decode step run. `start` keeps what it found: a launch with the same numbers, the same types and the same
alignment of pointers is of the same compiled kernel.

Numbers that the length of a pass decides are not specialized by (`do_not_specialize`): a prompt of 500 tokens would
wait for a kernel to be compiled that one of 512 did without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

Grid = tuple[int, ...]

KEPT = 4096
"""Launches that are remembered. One for every kernel and every set of its numbers: lengths of prompts vary."""

ALIGNED = 16
"""Triton compiles differently for pointers to multiples of so many bytes."""


class Launcher(Protocol):
    """Starts `kernel` over `grid`; `meta` holds its constants, num_warps and num_stages."""

    def __call__(self, kernel: Any, grid: Grid, *args: Any, **meta: Any) -> None: ...


class _Known(NamedTuple):
    kernel: Any
    """Kept, so that no other one gets its address, which is part of the key."""
    over: Callable[[Grid], Callable[..., None]]
    """Starts the compiled kernel over a grid of three dimensions."""
    constants: tuple[Any, ...]
    """Arguments that follow those of the call in the signature of the kernel."""


_known: dict[tuple[Any, ...], _Known] = {}


def start(kernel: Any, grid: Grid, *args: Any, **meta: Any) -> None:
    """Queue the kernel on the current stream of the device that holds its tensors; the first argument is one."""
    device = args[0].get_device()
    if device < 0:  # the interpreter
        kernel[grid](*args, **meta)
    elif device == torch._C._cuda_getDevice():
        _start(device, kernel, grid, args, meta)
    else:
        with torch.cuda.device(device):
            _start(device, kernel, grid, args, meta)


def _start(device: int, kernel: Any, grid: Grid, args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    key = launch_key(device, kernel, args, meta)
    known = _known.get(key)
    if known is None:
        found = kernel[grid](*args, **meta)
        names = kernel.arg_names[len(args) :]
        # Called with all arguments in the order of the signature, constants included; where that should not be so,
        # every launch goes through triton.
        if isinstance(found, CompiledKernel) and all(name in meta for name in names):
            if len(_known) >= KEPT:
                _known.clear()
            _known[key] = _Known(kernel, found.__getitem__, tuple(meta[name] for name in names))
        return
    known.over((*grid, 1, 1)[:3])(*args, *known.constants)


def launch_key(device: int, kernel: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> tuple[Any, ...]:
    """Equal for two launches only if triton would run the same compiled kernel.

    It specializes by the type and value of numbers and by the element type and alignment of tensors.
    """
    key: list[Any] = [device, id(kernel), *meta, *meta.values()]
    for arg in args:
        kind = type(arg)
        if kind is int:
            key.append(arg)
        elif isinstance(arg, Tensor):
            key += arg.dtype, arg.data_ptr() % ALIGNED == 0
        else:  # 1.0 and True equal 1
            key += kind, arg
    return tuple(key)
