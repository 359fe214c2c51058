"""Measuring a GPU through the device interface of the tiers: memory, link, kernels.

Owns what is copied and computed for it. Must not know which kind of device it is given: the simulated one runs the
same code, only its rates mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from offload.errors import BudgetError
from offload.kernels import ExpertSlab
from offload.kernels.device import DeviceKernels
from offload.store.layout import ExpertLayout
from offload.tiers.device import Device
from offload.tiers.vram_memory import slot_nbytes
from offload.tune.machine import Gpu
from offload.types import format_size

TOP_K = 8
"""Experts of one token."""

QUEUED = 4
"""Times that work is queued before the device is waited for: what one wait costs is no part of a rate."""


def measure_gpu(
    device: Device,
    kernels: DeviceKernels,
    expert: Tensor,
    layout: ExpertLayout,
    *,
    buffer_nbytes: int,
    seconds: float,
    ram_rate: Callable[[float], float],
) -> Gpu:
    """What `device` can do with experts of `layout`, of which `expert` (uint8 [>= stride]) is one.

    `seconds` per figure. `ram_rate(seconds)` has the processor read RAM for that long and returns bytes per second.
    Raises BudgetError when less than two tokens' experts fit into its free memory.
    """
    with device.guard():
        free, total = device.memory()
        pitch = slot_nbytes(layout)
        count = max(2 * TOP_K, buffer_nbytes // pitch // 2 * 2)
        if 2 * count * pitch > free:
            raise BudgetError(
                f"{device.name} has {format_size(free)} free; measuring it takes {format_size(2 * count * pitch)}: "
                "close other programs that use it, or measure without it (--device cpu)"
            )
        data = device.empty((count, pitch), torch.uint8)
        locked, pageable = device.pinned((count, pitch), torch.uint8), torch.zeros(count, pitch, dtype=torch.uint8)
        for host in (locked, pageable):
            host[:, : layout.stride] = expert[: layout.stride]

        def copy(host: Tensor) -> Callable[[], None]:
            def run() -> None:
                for slot in range(count):  # one by one, as experts are copied
                    device.copies.copy(data[slot], host[slot])

            return run

        h2d = _rate(device, data.nbytes, copy(locked), seconds)
        h2d_pageable = _rate(device, data.nbytes, copy(pageable), seconds)
        h2d_busy, ram_busy = _together(device, data.nbytes, copy(locked), ram_rate, seconds)
        return Gpu(
            name=device.name,
            vram=total,
            free=free,
            read=read_rate(device, data, seconds),
            h2d=h2d,
            h2d_pageable=h2d_pageable,
            h2d_with_reads=h2d_busy,
            ram_with_copies=ram_busy,
            kernels=_kernel_rate(device, kernels, ExpertSlab(layout, data), seconds),
        )


def _rate(device: Device, nbytes: int, work: Callable[[], None], seconds: float) -> float:
    """Bytes per second of work that moves `nbytes`, after a run that is not counted."""
    work()
    device.synchronize()
    begun, times = time.perf_counter(), 0
    while times < 2 * QUEUED or time.perf_counter() - begun < seconds:
        for _ in range(QUEUED):
            work()
        device.synchronize()
        times += QUEUED
    return nbytes * times / (time.perf_counter() - begun)


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

    def rate(work: Callable[[], None]) -> float:
        launch = partial(device.compute.launch, work, reads=[words], writes=[words])
        return _rate(device, data.nbytes, launch, seconds / 2)

    return max(rate(reduce), rate(move))


def _kernel_rate(device: Device, kernels: DeviceKernels, slab: ExpertSlab, seconds: float) -> float:
    """Weight bytes per second of one token's routed experts, the slots of one token after those of another."""
    where, hidden = device.torch_device, slab.layout.hidden_size
    x, outputs = torch.ones(1, hidden, device=where), torch.zeros(TOP_K, hidden, device=where)
    tokens = slab.slots // TOP_K
    slots = torch.arange(tokens * TOP_K, dtype=torch.int32, device=where).view(tokens, TOP_K)

    def work() -> None:
        for chosen in slots:
            launched = partial(kernels.slot_experts, slab, x, chosen, outputs)
            device.compute.launch(launched, reads=[slab.data], writes=[outputs])

    return _rate(device, slots.numel() * slab.layout.stride, work, seconds)
