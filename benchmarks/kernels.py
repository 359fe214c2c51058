"""Speed of the native weight kernels beside torch and bitsandbytes, as shares of this machine's read bandwidth.

    python benchmarks/kernels.py [--threads 1,2] [--tokens 1,2,8,64] [--codecs int4-g32,int8-g128] [--record]

The ceiling is a kernel that does nothing but read: vector loads in several streams, asked for ahead of time, from
huge pages, on as many threads. Reads and contenders take turns of 64 MB each (A B A C A), so a busy moment hits all of
them; the medians of the speeds and of the ratios to the reads around a turn are reported. Weights cycle through
512 MB, far beyond any last-level cache. `--record` appends one JSON row to
benchmarks/results/kernels.jsonl.
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
WINDOW = 64 << 20
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
        if "weight_scale" in parts:
            parts["weight_scale"].fill_(0.01)
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


def measure(
    kernels: NativeKernels, contenders: dict[str, tuple[Call, int, int]], memory: Tensor, rounds: int
) -> list[dict[str, Any]]:
    """Medians per contender; `share` is its bytes per second over those of the reads right before and after it.

    A turn moves about `WINDOW` bytes, as a read does: both meet the same moments of a machine that others use too.
    """
    speed: dict[str, list[float]] = {name: [] for name in contenders}
    share: dict[str, list[float]] = {name: [] for name in contenders}
    position = dict.fromkeys(contenders, 0)
    windows = memory.numel() // WINDOW
    turn = 0

    def read() -> float:
        nonlocal turn
        start, turn = turn % windows * WINDOW, turn + 1
        return read_speed(kernels, memory[start : start + WINDOW])

    before = read()
    for _ in range(rounds):
        for name, (call, copies, nbytes) in contenders.items():
            count = max(1, WINDOW // nbytes)
            taken = seconds(call, position[name], count, copies)
            after = read()
            position[name] = (position[name] + count) % copies
            speed[name].append(nbytes / taken)
            share[name].append(2 * nbytes / taken / (before + after))
            before = after
    return [
        {
            "kernel": name,
            "ms": round(contenders[name][2] / median(speed[name]) * 1e3, 4),
            "gb_s": round(median(speed[name]) / 1e9, 2),
            "share_of_read": round(median(share[name]), 3),
        }
        for name in contenders
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--tokens", default="1,2,8,64")
    parser.add_argument("--codecs", default="int4-g32,int4-g128,int8-g128,fp8,bf16")
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--rounds", type=int, default=40)
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
                    for row in measure(kernels, group, memory, options.rounds):
                        row = {"shape": f"{rows}x{cols}", "tokens": tokens, "threads": threads, **row}
                        results.append(row)
                        print(
                            f"{row['shape']:>10} M={tokens:<4d}{row['kernel']:28}{row['ms']:9.3f} ms"
                            f"{row['gb_s']:8.1f} GB/s{row['share_of_read']:7.2f}",
                            flush=True,
                        )
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
