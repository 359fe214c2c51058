"""Compute kernels: one API, several backends, chosen once and explicitly."""

from offload.kernels.api import Kernels, RouterShape
from offload.kernels.device import DeviceKernels, ExpertSlab
from offload.kernels.select import BACKENDS, DEVICE_BACKENDS, select, select_device

__all__ = [
    "BACKENDS",
    "DEVICE_BACKENDS",
    "DeviceKernels",
    "ExpertSlab",
    "Kernels",
    "RouterShape",
    "select",
    "select_device",
]
