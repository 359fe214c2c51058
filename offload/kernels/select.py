"""Choosing a backend. Owns the choice and its announcement; must not compute anything."""

from __future__ import annotations

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
    from offload.kernels import native

    reason = native.available()
    if reason is None:
        return native.NativeKernels(threads=threads)
    if name == "native":
        raise KernelError(f"the compiled CPU kernels cannot be used: {reason}")
    log.warning("compiled CPU kernels are not available (%s): using the slow torch reference", reason)
    return ReferenceKernels()


def select_device(name: str = "auto") -> DeviceKernels:
    """The backend called `name` for tensors on an accelerator; `auto` is the compiled one.

    Raises KernelError when that cannot be used: the reference would be too slow to take its place unasked.
    """
    if name not in DEVICE_BACKENDS:
        raise UsageError(f"unknown kernels {name!r} for a GPU; known: {', '.join(DEVICE_BACKENDS)}")
    if name == "reference":
        return ReferenceDeviceKernels()
    raise KernelError("there are no compiled kernels for a GPU yet; use --kernels reference")
