"""Which devices a model runs on.

Owns the choice between processor and GPUs and its announcement. Must not use a device.
"""

from __future__ import annotations

import logging

import torch

from offload.engine.options import RuntimeOptions
from offload.errors import DeviceError, KernelError, UsageError
from offload.kernels import select_device
from offload.tiers.device import Device

log = logging.getLogger("expertpager")

LEAST_CAPABILITY = (8, 0)
"""CUDA compute capability that the kernels need: bf16 in tensor cores."""


def open_devices(options: RuntimeOptions) -> list[Device]:
    """The GPUs to use; none where the processor computes.

    `auto` takes CUDA devices where they and the compiled kernels can be used, and says why where not. Raises
    DeviceError when `cuda` is asked for and cannot be had, UsageError for `--vram` without a GPU.
    """
    if options.device == "cpu":
        _refuse_vram(options)
        return []
    reason = _obstacle(options)
    if reason is None:
        from offload.tiers.cuda import CudaDevice

        return [CudaDevice(index) for index in range(torch.cuda.device_count())]
    if options.device == "cuda":
        raise DeviceError(f"--device cuda cannot be used: {reason}; --device cpu runs without a GPU")
    _refuse_vram(options)
    if _some_accelerator():
        log.warning("computing on the CPU: %s", reason)
    return []


def _refuse_vram(options: RuntimeOptions) -> None:
    if options.vram is not None:
        raise UsageError("--vram needs a CUDA device, and the model runs on the CPU")


def _obstacle(options: RuntimeOptions) -> str | None:
    """Why CUDA devices cannot be used; None if they can."""
    if torch.version.hip is not None:
        return "this is torch for AMD (ROCm), for which there are no kernels here"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device (nvidia-smi shows whether the driver does)"
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if capability < LEAST_CAPABILITY:
            name = torch.cuda.get_device_name(index)
            return (
                f"{name} has compute capability {capability[0]}.{capability[1]}, the kernels need "
                f"{LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}; CUDA_VISIBLE_DEVICES hides a device"
            )
    try:
        select_device(device_kernels(options.kernels))
    except KernelError as fault:
        return str(fault)
    return None


def device_kernels(name: str) -> str:
    """The backend for a GPU that belongs to `--kernels name`."""
    return "reference" if name == "reference" else "auto"


def _some_accelerator() -> bool:
    """Whether this machine has something that users may expect to be used."""
    if torch.version.hip is not None or torch.cuda.is_available():
        return True
    return torch.backends.mps.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())
