"""Speed of the native weight kernels beside torch and bitsandbytes, as shares of this machine's read bandwidth.

    python benchmarks/kernels.py [--threads 1,2] [--tokens 1,2,8,64] [--codecs int4-g32,int8-g128] [--record]

The ceiling is a kernel that does nothing but read: vector loads in several streams, asked for ahead of time, from
huge pages, on as many threads. Reads and contenders take turns of 16 MB each (A B A C A), so a busy moment hits all of
them; the medians of the speeds and of the ratios to the reads around a turn are reported. Weights cycle through
512 MB, far beyond any last-level cache.

On a virtual machine the other hardware thread of a core may belong to somebody else. While that computes, ours has
about half of the core's instructions but all of its memory bandwidth, and the ratio says something of the neighbour.
So the pace of the cores is taken before and after every turn, as the time of a product whose weights lie in the
caches, and the turns in which all cores had their full pace are reported apart (`alone`). `--patience` is for how many
seconds such turns are waited for. `--record` appends one JSON row to benchmarks/results/kernels.jsonl.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from offload.kernels.native import NativeKernels
from offload.quant import QuantizedTensor, get_codec
from offload.tiers.host import SlotPool

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "kernels.jsonl"
CYCLE = 512 << 20
WINDOW = 16 << 20
FULL_PACE = 0.92
"""Part of the best pace seen, from which on a core counts as undisturbed."""
SHAPES = ((2048, 7168), (7168, 2048), (1024, 2048))
Call = Callable[[int], object]
"""Runs a contender on its i-th copy of the weight."""


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"cpu": model, "cores": os.cpu_count(), "load": load, "system": platform.platform()}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "bitsandbytes"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    run = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


def huge_memory(nbytes: int) -> Tensor:
    """uint8 [nbytes] of random bytes in huge pages where the system gives them, as slots of experts are."""
    memory = SlotPool(1, nbytes).bytes[:nbytes]
    torch.randint(0, 255, (nbytes,), dtype=torch.uint8, out=memory)
    return memory


def read_speed(kernels: NativeKernels, memory: Tensor) -> float:
    """Bytes per second of one read of `memory`."""
    start = time.perf_counter()
    kernels.read(memory)
    return memory.nbytes / (time.perf_counter() - start)


def native_copies(codec: str, rows: int, cols: int, memory: Tensor) -> list[QuantizedTensor]:
    """As many weights as fit into `memory`; random codes, one constant scale."""
    specs = get_codec(codec).parts(rows, cols)
    stride = sum(-(-spec.nbytes // 64) * 64 for spec in specs)
    copies = []
    for start in range(0, memory.numel() - stride, stride):
        parts, at = {}, start
        for spec in specs:
            parts[spec.suffix] = memory[at : at + spec.nbytes].view(spec.dtype).view(spec.shape)
            at += -(-spec.nbytes // 64) * 64
        for scale in ("weight_scale", "weight.absmax"):
            if scale in parts:
                parts[scale].fill_(0.01)
        if codec == "bf16":
            parts["weight"].fill_(0.01)
        if codec == "fp8":  # neither NaN nor subnormal, as nearly all weights are
            parts["weight"].view(torch.uint8).bitwise_and_(0xB7).bitwise_or_(0x40)
        copies.append(QuantizedTensor(get_codec(codec), rows, cols, parts))
    return copies


def cycle(nbytes: int) -> range:
    """Indices of enough copies of a tensor to fill the cycle."""
    return range(max(2, CYCLE // nbytes))


def torch_contenders(rows: int, cols: int, tokens: int) -> dict[str, tuple[Call, int, int]]:
    """Name -> call, number of copies, bytes of one weight. Those that this torch lacks are left out."""
    x = torch.randn(tokens, cols)
    x_bf16 = x.bfloat16()
    found: dict[str, tuple[Call, int, int]] = {}

    def add(name: str, weights: list[Any], nbytes: int, call: Callable[[Any], object]) -> None:
        try:
            call(weights[0])
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            print(f"   {name} is left out: {str(error).splitlines()[0]}", file=sys.stderr)
            return
        found[name] = (lambda i: call(weights[i]), len(weights), nbytes)

    size = rows * cols
    add("torch fp32 linear", [torch.ones(rows, cols) for _ in cycle(size * 4)], size * 4, lambda w: linear(x, w))
    bf16 = [torch.ones(rows, cols, dtype=torch.bfloat16) for _ in cycle(size * 2)]
    add("torch bf16 linear", bf16, size * 2, lambda w: linear(x_bf16, w))
    int8 = [torch.ones(rows, cols, dtype=torch.int8) for _ in cycle(size)]
    codes, scales = x.to(torch.int8), torch.ones(rows, dtype=torch.bfloat16)
    add("torch _int_mm", int8, size, lambda w: torch._int_mm(codes, w.t()))
    add("torch _weight_int8pack_mm", int8, size, lambda w: torch.ops.aten._weight_int8pack_mm(x_bf16, w, scales))
    try:
        plain = torch.ones(rows, cols, dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(plain, 2)
        groups = torch.ones(cols // 32, rows, 2, dtype=torch.bfloat16)
        pairs = [(packed.clone(), groups.clone()) for _ in cycle(size * 5 // 8)]
        int4 = torch.ops.aten._weight_int4pack_mm_for_cpu
        add("torch int4pack g32", pairs, size * 5 // 8, lambda w: int4(x_bf16, w[0], 32, w[1]))
    except (RuntimeError, AttributeError) as error:
        print(f"   torch int4pack g32 is left out: {error}", file=sys.stderr)
    try:
        add_bitsandbytes(add, rows, cols, x_bf16)
    except ImportError:
        print("   bitsandbytes is not installed", file=sys.stderr)
    return found


def add_bitsandbytes(add: Callable[..., None], rows: int, cols: int, x: Tensor) -> None:
    """nf4 blocks of 64 the way its Linear4bit runs them on a CPU: dequantise, then multiply."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(torch.randn(rows, cols).bfloat16(), blocksize=64, quant_type="nf4")
    nbytes = rows * cols // 2 + rows * cols // 64 * 4
    copies = [packed.clone() for _ in cycle(nbytes)]
    add("bitsandbytes nf4", copies, nbytes, lambda w: linear(x, dequantize_4bit(w, state)))


def seconds(call: Call, first: int, count: int, copies: int) -> float:
    """Seconds per call over `count` consecutive copies."""
    turns = [(first + i) % copies for i in range(count)]
    start = time.perf_counter()
    for turn in turns:
        call(turn)
    return (time.perf_counter() - start) / count


class Pace:
    """How fast all cores compute now, as a share of the fastest that was seen."""

    def __init__(self, kernels: NativeKernels, threads: int) -> None:
        codec, rows, cols = get_codec("int4-g32"), 192 * threads, 2048
        generator = torch.Generator().manual_seed(0)
        parts = codec.encode(torch.randn(rows, cols, generator=generator))
        self._kernels, self._weight = kernels, QuantizedTensor(codec, rows, cols, parts)
        self._x = torch.randn(1, cols, generator=generator)
        found = sorted(self._seconds() for _ in range(4000))
        self._best = found[len(found) // 100]

    def _seconds(self) -> float:
        self._kernels.linear(self._x, self._weight)  # the turn before has pushed the weight out of the caches
        start = time.perf_counter()
        self._kernels.linear(self._x, self._weight)
        self._kernels.linear(self._x, self._weight)
        return time.perf_counter() - start

    def now(self) -> float:
        return self._best / self._seconds()


@dataclass
class Turns:
    """What the turns of a contender gave."""

    speeds: list[float] = field(default_factory=list)
    """Bytes per second."""
    shares: list[float] = field(default_factory=list)
    """Of the speed of the reads right before and after the turn."""

    def row(self, nbytes: int) -> dict[str, Any]:
        speed = median(self.speeds)
        return {
            "ms": round(nbytes / speed * 1e3, 4),
            "gb_s": round(speed / 1e9, 2),
            "share_of_read": round(median(self.shares), 3),
        }


def measure(
    kernels: NativeKernels,
    contenders: dict[str, tuple[Call, int, int]],
    memory: Tensor,
    rounds: int,
    pace: Pace,
    patience: float,
) -> list[dict[str, Any]]:
    """Medians per contender over all turns and over those at full pace.

    A turn moves about `WINDOW` bytes, as a read does: both meet the same moments of a machine that others use too.
    """
    every = {name: Turns() for name in contenders}
    alone = {name: Turns() for name in contenders}
    position = dict.fromkeys(contenders, 0)
    windows = memory.numel() // WINDOW
    turn = 0

    def read() -> float:
        nonlocal turn
        start, turn = turn % windows * WINDOW, turn + 1
        return read_speed(kernels, memory[start : start + WINDOW])

    begun, done = time.perf_counter(), 0
    while done < rounds or (
        time.perf_counter() - begun < patience and min(len(found.speeds) for found in alone.values()) < rounds
    ):
        done += 1
        paces = [pace.now()]
        before = read()
        paces.append(pace.now())
        for name, (call, copies, nbytes) in contenders.items():
            count = max(1, WINDOW // nbytes)
            taken = seconds(call, position[name], count, copies)
            paces.append(pace.now())
            after = read()
            paces.append(pace.now())
            position[name] = (position[name] + count) % copies
            undisturbed = min(paces[-4:]) >= FULL_PACE
            for found in [every[name], alone[name]] if undisturbed else [every[name]]:
                found.speeds.append(nbytes / taken)
                found.shares.append(2 * nbytes / taken / (before + after))
            before = after
    rows = []
    for name, (_, _, nbytes) in contenders.items():
        row = {"kernel": name} | every[name].row(nbytes)
        if alone[name].speeds:
            row["alone"] = alone[name].row(nbytes) | {"turns": len(alone[name].speeds)}
        rows.append(row)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    figures = f"{row['ms']:9.3f} ms{row['gb_s']:8.1f} GB/s{row['share_of_read']:7.2f}"
    alone = row.get("alone")
    more = f"   alone {alone['gb_s']:.1f} GB/s {alone['share_of_read']:.2f} ({alone['turns']} turns)" if alone else ""
    return f"{row['shape']:>10} M={row['tokens']:<4d}{row['kernel']:28}{figures}{more}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--tokens", default="1,2,8,64")
    parser.add_argument("--codecs", default="int4-g32,int4-g128,int8-g128,fp8,bf16")
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--patience", type=float, default=0.0, help="seconds to wait for turns at full pace")
    parser.add_argument("--native-only", action="store_true")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    memory = huge_memory(CYCLE)
    results: list[dict[str, Any]] = []
    reads: dict[str, dict[str, float]] = {}
    for threads in (int(n) for n in options.threads.split(",")):
        torch.set_num_threads(threads)
        kernels = NativeKernels(threads=threads, isa=options.isa)
        pace = Pace(kernels, threads)
        rates = [read_speed(kernels, memory) / 1e9 for _ in range(options.rounds)]
        found = f"{median(rates):.1f} GB/s, at best {max(rates):.1f}"
        print(f"== {threads} threads, {kernels.isa}: reads {found}", flush=True)
        reads[str(threads)] = {"median_gb_s": round(median(rates), 2), "best_gb_s": round(max(rates), 2)}
        for rows, cols in SHAPES:
            for tokens in (int(n) for n in options.tokens.split(",")):
                x = torch.randn(tokens, cols)
                others = {} if options.native_only else torch_contenders(rows, cols, tokens)
                for codec in options.codecs.split(","):
                    # Codecs share the memory, so one at a time; the other contenders run beside the first.
                    copies = native_copies(codec, rows, cols, memory)
                    call: Call = lambda i, w=copies, x=x, k=kernels: k.linear(x, w[i])  # type: ignore[misc]  # noqa: E731
                    group = {f"native {codec}": (call, len(copies), copies[0].nbytes), **others}
                    others = {}
                    for row in measure(kernels, group, memory, options.rounds, pace, options.patience):
                        row = {"shape": f"{rows}x{cols}", "tokens": tokens, "threads": threads, **row}
                        results.append(row)
                        print(line(row), flush=True)
    if options.record:
        record = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join(["python", "benchmarks/kernels.py", *sys.argv[1:]]),
            "commit": commit(),
            "machine": machine(),
            "versions": versions(),
            "isa": kernels.isa,
            "read": reads,
            "results": results,
        }
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
