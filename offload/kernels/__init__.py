"""Compute kernels: one API, several backends, chosen once and explicitly."""

from offload.kernels.api import (
    AttentionLayer,
    FusedKernels,
    Kernels,
    ModelEnds,
    MoeLayer,
    MoeStart,
    OneToken,
    RouterShape,
)
from offload.kernels.device import DeviceKernels, ExpertSlab
from offload.kernels.select import BACKENDS, DEVICE_BACKENDS, select, select_device

__all__ = [
    "BACKENDS",
    "DEVICE_BACKENDS",
    "AttentionLayer",
    "DeviceKernels",
    "ExpertSlab",
    "FusedKernels",
    "Kernels",
    "ModelEnds",
    "MoeLayer",
    "MoeStart",
    "OneToken",
    "RouterShape",
    "select",
    "select_device",
]
