"""Measuring this machine with the devices that a run would use.

Owns nothing but the choice of devices; `tune.probe` measures.
"""

from __future__ import annotations

from typing import Any

from offload.engine.devices import device_kernels, open_devices
from offload.engine.options import RuntimeOptions
from offload.kernels import select_device
from offload.tune.probe import ProbeReport
from offload.tune.probe import probe as measure


def probe(output: str, *, device: str = "auto", kernels: str = "auto", **arguments: Any) -> ProbeReport:
    """`tune.probe.probe`, with the first of the GPUs that `device` (auto, cpu, cuda) finds."""
    devices = open_devices(RuntimeOptions(device=device, kernels=kernels))
    try:
        gpu = (devices[0], select_device(device_kernels(kernels))) if devices else None
        return measure(output, kernels=kernels, gpu=gpu, **arguments)
    finally:
        for opened in devices:
            opened.close()
