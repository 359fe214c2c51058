"""What a probe found, for people and for machines.

Owns the words. Must not measure (`probe` does).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from offload.tune.machine import ENGINE_TIMES, MANY_ROWS, PASS_TOKENS, ROWS, Gpu, MachineSpec
from offload.types import format_size


@dataclass(frozen=True)
class ProbeReport:
    """The measured machine and where its file is."""

    machine: MachineSpec
    path: Path
    kernels: str

    def lines(self) -> Iterator[str]:
        """For people."""
        machine = self.machine
        depths = ", ".join(f"{n}: {rate / 1e9:.2f}" for n, rate in machine.depths.items())
        threads = ", ".join(f"{n}: {rate / 1e9:.1f}" for n, rate in machine.ram_threads.items())
        yield f"{machine.name}: {format_size(machine.ram_total)} RAM, {machine.threads} threads, {self.kernels} kernels"
        yield f"drive  {machine.drive_read / 1e9:.2f} GB/s at the runtime's depth; by reads under way: {depths}"
        beside = f"{machine.drive_beside:.0%} of it beside the kernels, which do {machine.kernels_beside:.0%} of theirs"
        yield f"       {beside}"
        yield f"RAM    {machine.ram_read / 1e9:.1f} GB/s; by threads: {threads}"
        for codec, rate in machine.formats.items():
            share = rate.read / machine.ram_read
            one = f"{rate.read / 1e9:>6.2f} GB/s ({share:.0%} of RAM) with one row"
            whole = f"; attention {rate.attention / 1e9:.2f} GB/s" if rate.attention else ""
            many = f", {rate.gflops_many:.0f} with {MANY_ROWS}" if rate.gflops_many else ""
            yield f"{codec:<10} {one}, {rate.gflops:.0f} GFLOP/s with {ROWS}{many}{whole}"
        if machine.gpu is not None:
            yield from _gpu_lines(machine.gpu)
        spent = f"layer  {1e6 * machine.layer_s:.0f} us besides matrix products"
        spent += f", {1e6 * machine.miss_s:.0f} us for every expert that is read"
        yield f"{spent}, {1e6 * machine.foresee_s:.0f} us for a router applied early"
        yield f"token  {1e6 * machine.token_s:.0f} us outside of layers"
        spent = f"prompt {1e6 * (machine.prompt_layer_s or 0):.0f} us per layer"
        spent += f", {1e6 * machine.prompt_token_s:.0f} us for each of its tokens"
        yield f"{spent}, {1e6 * (machine.prompt_miss_s or 0):.0f} us for every expert that is read"
        for text in machine.warnings:
            yield f"warning: {text}"
        yield f"written to {self.path}"

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        machine = self.machine
        return {
            "path": str(self.path),
            "kernels": self.kernels,
            "drive_read": machine.drive_read,
            "drive_latency_s": machine.drive_latency_s,
            "depths": dict(machine.depths),
            "drive_beside": machine.drive_beside,
            "kernels_beside": machine.kernels_beside,
            "ram_read": machine.ram_read,
            "ram_threads": dict(machine.ram_threads),
            "formats": {name: vars(rate) for name, rate in machine.formats.items()},
            "attention_gflops": machine.attention_gflops,
            **{name: getattr(machine, name) for name in ENGINE_TIMES},
            "plain": dict(machine.plain),
            "gpu": asdict(machine.gpu) if machine.gpu else None,
            "warnings": list(machine.warnings),
        }


def _gpu_lines(gpu: Gpu) -> Iterator[str]:
    yield f"GPU    {gpu.name}: {format_size(gpu.vram)}, {format_size(gpu.free or 0)} of it free"
    yield f"       memory {gpu.read / 1e9:.0f} GB/s"
    yield f"       from pinned RAM {gpu.h2d / 1e9:.1f} GB/s, not pinned {(gpu.h2d_pageable or 0) / 1e9:.1f} GB/s"
    together = (gpu.h2d_with_reads or 0) / 1e9, (gpu.ram_with_copies or 0) / 1e9
    yield f"       {together[0]:.1f} GB/s while the processor reads {together[1]:.1f} GB/s"
    for what, rates in (("experts", gpu.experts), ("attention", gpu.resident)):
        for codec, rate in rates.items():
            share = f"{rate.read / 1e9:.0f} GB/s ({rate.read / gpu.read:.0%} of its memory)"
            yield f"       {what} {codec}: {share} with one token, {rate.gflops / 1e3:.1f} TFLOP/s with {PASS_TOKENS}"
    yield f"       tokens before a long pass: {gpu.past_gflops / 1e3:.1f} TFLOP/s"
    deciding = f"deciding {1e6 * gpu.decide_s:.0f} us per layer, {1e6 * gpu.decide_token_s:.0f} per token"
    yield (
        f"       layer {1e6 * gpu.layer_s:.0f} us besides weights ({1e6 * gpu.prompt_layer_s:.0f} in a prompt), token "
        f"{1e6 * (gpu.token_s or 0):.0f} us; {deciding}"
    )
