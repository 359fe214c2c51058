"""Measuring a GPU through the device interface of the tiers: memory, link, kernels.

Owns what is copied and computed for it. Must not know which kind of device it is given: the simulated one runs the
same code, only its rates mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from offload.errors import BudgetError
from offload.kernels import AttentionLayer, ExpertSlab
from offload.kernels.device import DeviceKernels
from offload.store.layout import ExpertWeights
from offload.tiers.device import Device
from offload.tiers.vram_memory import slot_nbytes
from offload.tune.attention_shapes import AttentionShapes
from offload.tune.machine import PASS_TOKENS, Gpu
from offload.tune.overhead_gpu import measure_gpu_overhead
from offload.tune.probe_gpu_kernels import TOP_K, expert_rate, past_rate, rate, resident_rate
from offload.types import format_size


def measure_gpu(
    device: Device,
    kernels: DeviceKernels,
    experts: Mapping[str, ExpertWeights],
    resident: Mapping[str, AttentionLayer],
    shapes: AttentionShapes,
    *,
    buffer_nbytes: int,
    seconds: float,
    ram_rate: Callable[[float], float],
) -> Gpu:
    """What `device` can do with routed `experts` and blocks of attention (`resident`, of `shapes`), one by format.

    The link is measured with the first of the experts. `seconds` per figure, kernels take a quarter of it.
    `ram_rate(seconds)` has the processor read RAM for that long and returns bytes per second. What layers and tokens
    take besides is measured with a model of its own. Raises BudgetError when two tokens' experts and the outputs of a
    long pass do not fit into its free memory.
    """
    expert = next(iter(experts.values()))
    layout = expert.layout
    with device.guard():
        free, total = device.memory()
        pitch = slot_nbytes(layout)
        count = max(2 * TOP_K, buffer_nbytes // pitch // 2 * 2)
        largest = max(slot_nbytes(each.layout) for each in experts.values())
        need = count * (pitch + largest) + 4 * PASS_TOKENS * TOP_K * layout.hidden_size
        if need > free:
            raise BudgetError(
                f"{device.name} has {format_size(free)} free; measuring it takes {format_size(need)}: "
                "close other programs that use it, or measure without it (--device cpu)"
            )
        data = device.empty((count, pitch), torch.uint8)
        locked, pageable = device.pinned((count, pitch), torch.uint8), torch.zeros(count, pitch, dtype=torch.uint8)
        for host in (locked, pageable):
            host[:, : layout.stride] = expert.buffer[: layout.stride]

        def copy(host: Tensor) -> Callable[[], None]:
            def run() -> None:
                for slot in range(count):  # one by one, as experts are copied
                    device.copies.copy(data[slot], host[slot])

            return run

        measured = _kernels(device, kernels, experts, resident, shapes, count, seconds / 4)
        h2d = rate(device, data.nbytes, copy(locked), seconds)
        h2d_pageable = rate(device, data.nbytes, copy(pageable), seconds)
        h2d_busy, ram_busy = _together(device, data.nbytes, copy(locked), ram_rate, seconds)
        overhead = measure_gpu_overhead(device, kernels, seconds / 2)
        return Gpu(
            name=device.name,
            vram=total,
            free=free,
            read=read_rate(device, data, seconds),
            h2d=h2d,
            h2d_pageable=h2d_pageable,
            h2d_with_reads=h2d_busy,
            ram_with_copies=ram_busy,
            **measured,
            **vars(overhead),
        )


def _kernels(
    device: Device,
    kernels: DeviceKernels,
    experts: Mapping[str, ExpertWeights],
    resident: Mapping[str, AttentionLayer],
    shapes: AttentionShapes,
    count: int,
    seconds: float,
) -> dict[str, Any]:
    """The figures of `Gpu` about kernels, with `count` experts in memory."""
    slabs = {}
    for codec, expert in experts.items():
        pitch = slot_nbytes(expert.layout)
        data = device.empty((count, pitch), torch.uint8)
        one = torch.zeros(pitch, dtype=torch.uint8)
        one[: expert.layout.stride] = expert.buffer[: expert.layout.stride]
        data.copy_(one.to(data.device).expand(count, pitch))
        slabs[codec] = expert_rate(device, kernels, ExpertSlab(expert.layout, data), seconds)
        del data
    blocks = {codec: resident_rate(device, kernels, layer, shapes, seconds) for codec, layer in resident.items()}
    return {"experts": slabs, "resident": blocks, "attention_gflops": past_rate(device, kernels, shapes, seconds)}


def _together(
    device: Device, nbytes: int, copy: Callable[[], None], ram_rate: Callable[[float], float], seconds: float
) -> tuple[float, float]:
    """(bytes per second of copies, of the processor's reads) while both go on."""
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(ram_rate, seconds)
        begun, times = time.perf_counter(), 0
        while not reading.done() or not times:
            copy()
            device.synchronize()
            times += 1
        return nbytes * times / (time.perf_counter() - begun), reading.result()


def read_rate(device: Device, data: Tensor, seconds: float) -> float:
    """Bytes per second of device memory: the better of a reduction and of copies within it."""
    words = data.view(-1).view(torch.int32)
    half = words.numel() // 2

    def reduce() -> None:
        words.max()

    def move() -> None:  # half is read, half is written; an even number of equal experts is the same afterwards
        words[:half].copy_(words[half:])

    launches = (partial(device.compute.launch, work, reads=[words], writes=[words]) for work in (reduce, move))
    return max(rate(device, data.nbytes, launch, seconds / 2) for launch in launches)
