"""Measuring this machine with the devices that a run would use.

Owns the choice of devices, and what is sampled for it; `tune.probe` measures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from offload.engine.devices import device_kernels, open_devices
from offload.engine.options import RuntimeOptions
from offload.engine.request import SamplingParams
from offload.engine.sampler import Sampler
from offload.kernels import select_device
from offload.tune.probe import probe as measure
from offload.tune.probe_report import ProbeReport


def probe(output: str, *, device: str = "auto", kernels: str = "auto", **arguments: Any) -> ProbeReport:
    """`tune.probe.probe`, with the first of the GPUs that `device` (auto, cpu, cuda) finds."""
    devices = open_devices(RuntimeOptions(device=device, kernels=kernels))
    try:
        gpu = (devices[0], select_device(device_kernels(kernels))) if devices else None
        return measure(output, kernels=kernels, gpu=gpu, sampling=sampling, **arguments)
    finally:
        for opened in devices:
            opened.close()


def sampling(vocab_size: int) -> Callable[[], int]:
    """Draws a token from `vocab_size` logits with the default options: probabilities fall as those of a text do."""
    logits = (-1.5 * np.log(np.arange(1, vocab_size + 1))).astype(np.float32)
    row, sampler = np.random.default_rng(0).permutation(logits), Sampler(SamplingParams(seed=0))
    return lambda: sampler.sample(row, 0)
