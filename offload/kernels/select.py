"""Choosing a backend. Owns the choice and its announcement; must not compute anything."""

from __future__ import annotations

import importlib.util
import logging

import torch

from offload.errors import KernelError, UsageError
from offload.kernels.api import Kernels
from offload.kernels.device import DeviceKernels
from offload.kernels.reference import ReferenceKernels
from offload.kernels.reference_device import ReferenceDeviceKernels

log = logging.getLogger("expertpager")

BACKENDS = ("auto", "native", "reference")
DEVICE_BACKENDS = ("auto", "triton", "reference")


def select(name: str = "auto", threads: int | None = None) -> Kernels:
    """The backend called `name`; `auto` takes the compiled one where it works and says so where not.

    Torch itself is set to one thread: how its matrix products are cut over threads changes their last
    bits, and results must not depend on `threads`. The native backend has threads of its own.
    Raises KernelError when the compiled backend is asked for and cannot be used.
    """
    if name not in BACKENDS:
        raise UsageError(f"unknown kernels {name!r}; known: {', '.join(BACKENDS)}")
    torch.set_num_threads(1)
    if name == "reference":
        return ReferenceKernels()
    from offload.kernels.native import NativeKernels
    from offload.kernels.native_library import available

    reason = available()
    if reason is None:
        return NativeKernels(threads=threads)
    if name == "native":
        raise KernelError(f"the compiled CPU kernels cannot be used: {reason}")
    log.warning("compiled CPU kernels are not available (%s): using the slow torch reference", reason)
    return ReferenceKernels()


def select_device(name: str = "auto") -> DeviceKernels:
    """The backend called `name` for tensors on an accelerator; `auto` is the compiled one.

    Raises KernelError when that cannot be used: the reference is too slow to take its place unasked.
    """
    if name not in DEVICE_BACKENDS:
        raise UsageError(f"unknown kernels {name!r} for a GPU; known: {', '.join(DEVICE_BACKENDS)}")
    if name == "reference":
        return ReferenceDeviceKernels()
    reason = _no_triton()
    if reason is not None:
        raise KernelError(f"the GPU kernels cannot be used: {reason}; use --device cpu, or --kernels reference (slow)")
    from offload.kernels.triton.backend import TritonKernels

    return TritonKernels()


def _no_triton() -> str | None:
    """Why the Triton kernels cannot run on the current device, or None."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.version.hip is not None:
        return "they are for NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, they need 8.0 or later"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None
