"""Measuring the kernels of a GPU by format: one row as decoding runs them, and the rows of a long prompt.

Owns the work that is timed and its sizes. What decoding repeats is recorded, as a run records it: launching kernels
from Python takes longer than they do. Must not know which kind of device it is given.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from offload.kernels import AttentionLayer, ExpertSlab
from offload.kernels.device import DeviceKernels
from offload.model.blocks import BLOCK
from offload.quant import QuantizedTensor
from offload.tiers.device import Device
from offload.tune.attention_shapes import AttentionShapes
from offload.tune.machine import PASS_TOKENS, FormatRate

TOP_K = 8
"""Experts of one token."""

QUEUED = 4
"""Times that work is queued before the device is waited for: what one wait costs is no part of a rate."""

EXPERT_ROWS = 64
"""Rows of an expert in a pass of PASS_TOKENS tokens, 256 experts, top-8."""


def rate(device: Device, amount: float, work: Callable[[], None], seconds: float) -> float:
    """`amount` (bytes, operations) per second of work that does as much, after a run that is not counted."""
    work()
    device.synchronize()
    begun, times = time.perf_counter(), 0
    while times < 2 * QUEUED or time.perf_counter() - begun < seconds:
        for _ in range(QUEUED):
            work()
        device.synchronize()
        times += QUEUED
    return amount * times / (time.perf_counter() - begun)


def expert_rate(device: Device, kernels: DeviceKernels, slab: ExpertSlab, seconds: float) -> FormatRate:
    """Routed experts in `slab`, at least 2 * TOP_K: one token after another, and a pass of PASS_TOKENS tokens."""
    where, hidden = device.torch_device, slab.layout.hidden_size
    # Of the positions of a pass as many are of this slab as give each of its experts the rows that it has there.
    positions = PASS_TOKENS * TOP_K
    present = min(positions, slab.slots * EXPERT_ROWS)
    slots = torch.full((positions,), -1, dtype=torch.int32)
    at = torch.arange(present) * (positions // present)
    slots[at] = (torch.arange(present) % slab.slots).to(torch.int32)
    x, outputs = torch.ones(PASS_TOKENS, hidden, device=where), device.empty((positions, hidden), torch.float32)
    work = partial(kernels.slot_experts, slab, x, slots.to(where), outputs)
    launch = partial(device.compute.launch, work, reads=[slab.data], writes=[outputs])
    flops = 2.0 * present * 3 * hidden * slab.layout.moe_intermediate_size
    return FormatRate(expert_read(device, kernels, slab, seconds), rate(device, flops, launch, seconds) / 1e9)


def expert_read(device: Device, kernels: DeviceKernels, slab: ExpertSlab, seconds: float) -> float:
    """Weight bytes per second of the experts of one token, the slots of one token after those of another."""
    where, hidden = device.torch_device, slab.layout.hidden_size
    x, outputs = torch.ones(1, hidden, device=where), torch.zeros(TOP_K, hidden, device=where)
    slots = torch.arange(slab.slots // TOP_K * TOP_K, dtype=torch.int32, device=where).view(-1, TOP_K)

    def work() -> None:
        for chosen in slots:
            kernels.slot_experts(slab, x, chosen, outputs)

    return rate(device, slots.numel() * slab.layout.stride, device.record(work), seconds)


def resident_rate(
    device: Device, kernels: DeviceKernels, layer: AttentionLayer, shapes: AttentionShapes, seconds: float
) -> FormatRate:
    """The matrices of a block of attention, one after the other: with one row, and with PASS_TOKENS rows."""
    straight = [weight for name, weight in _matrices(device, layer, shapes).items() if name != "kv_b"]
    rows = [torch.ones(PASS_TOKENS, weight.cols, device=device.torch_device) for weight in straight]

    def work() -> None:
        for x, weight in zip(rows, straight, strict=True):
            kernels.linear(x, weight)

    flops = 2.0 * PASS_TOKENS * sum(weight.rows * weight.cols for weight in straight)
    gflops = rate(device, flops, partial(device.compute.launch, work), seconds) / 1e9
    return FormatRate(resident_read(device, kernels, layer, shapes, seconds), gflops)


def resident_read(
    device: Device, kernels: DeviceKernels, layer: AttentionLayer, shapes: AttentionShapes, seconds: float
) -> float:
    """Weight bytes per second of these matrices with one row. One of them is applied from both sides."""
    where, matrices = device.torch_device, _matrices(device, layer, shapes)
    straight = [weight for name, weight in matrices.items() if name != "kv_b"]
    rows = [torch.ones(1, weight.cols, device=where) for weight in straight]
    q_nope = torch.ones(1, shapes.num_attention_heads, shapes.qk_nope_head_dim, device=where)
    latent = torch.ones(1, shapes.num_attention_heads, shapes.kv_lora_rank, device=where)

    def work() -> None:
        for x, weight in zip(rows, straight, strict=True):
            kernels.linear(x, weight)
        kernels.absorb_query(q_nope, matrices["kv_b"])
        kernels.expand_value(latent, matrices["kv_b"], shapes.v_head_dim)

    return rate(device, sum(weight.nbytes for weight in matrices.values()), device.record(work), seconds)


def _matrices(device: Device, layer: AttentionLayer, shapes: AttentionShapes) -> dict[str, QuantizedTensor]:
    return {name: getattr(layer, name).to(device.torch_device) for name in shapes.matrices}


def past_rate(device: Device, kernels: DeviceKernels, shapes: AttentionShapes, seconds: float) -> float:
    """2 x multiply-adds per second of the last block of a pass of PASS_TOKENS tokens with those before it, in units of
    1e9."""
    where, heads, start = device.torch_device, shapes.num_attention_heads, PASS_TOKENS - BLOCK
    latent, rope = shapes.kv_lora_rank, shapes.qk_rope_head_dim
    q_latent, q_rope = (torch.ones(BLOCK, heads, size, device=where) for size in (latent, rope))
    cache = torch.ones(PASS_TOKENS, latent + rope, dtype=kernels.latent_dtype, device=where)

    def work() -> None:
        kernels.mla_absorbed(q_latent, q_rope, cache, start, (latent + rope) ** -0.5)

    flops = shapes.past_flops * BLOCK * (start + BLOCK / 2)
    return rate(device, flops, partial(device.compute.launch, work), seconds) / 1e9
