"""Compute kernels: one API, several backends, chosen once and explicitly."""

from offload.kernels.api import (
    AttentionLayer,
    Block,
    DenseLayer,
    FusedKernels,
    Kernels,
    ModelEnds,
    MoeLayer,
    MoeStart,
    OneToken,
    Residents,
    RouterShape,
)
from offload.kernels.device import DeviceKernels, ExpertSlab
from offload.kernels.select import BACKENDS, DEVICE_BACKENDS, select, select_device

__all__ = [
    "BACKENDS",
    "DEVICE_BACKENDS",
    "AttentionLayer",
    "Block",
    "DenseLayer",
    "DeviceKernels",
    "ExpertSlab",
    "FusedKernels",
    "Kernels",
    "ModelEnds",
    "MoeLayer",
    "MoeStart",
    "OneToken",
    "Residents",
    "RouterShape",
    "select",
    "select_device",
]
