"""How fast the GPU kernels run on DeepSeek-V3's shapes, beside what the device's memory gives.

    python benchmarks/gpu_speed.py [--codecs int4-g32 int8-g128 fp8]

Every kernel is timed as decoding runs it: calls over weights that take turns, so that none lies in a cache, recorded
in one CUDA graph and replayed; what the calls do besides the product (arranging the vector, grouping) counts. The
shares are of `read`, the better of a copy within the device and a reduction. Appends one row to
benchmarks/results/gpu_speed.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from gpu_model import random_expert, random_weight  # noqa: E402
from record import append  # noqa: E402
from torch import Tensor  # noqa: E402

from offload.kernels import ExpertSlab, select_device  # noqa: E402
from offload.quant import QuantizedTensor, get_codec  # noqa: E402
from offload.store.layout import ExpertLayout  # noqa: E402
from offload.types import align_up  # noqa: E402

HIDDEN, WIDTH, EXPERTS, TOP_K, HEADS, RANK, ROPE, VOCABULARY = 7168, 2048, 256, 8, 128, 512, 64, 129280
TOKENS = 2048
"""Of a long pass."""
RESIDENT = {
    "kv_a": (576, HIDDEN),
    "q_a": (1536, HIDDEN),
    "q_b": (24576, 1536),
    "o": (HIDDEN, 16384),
    "dense_gate": (18432, HIDDEN),
}
TURN_NBYTES = 200_000_000
"""Weights that take turns: several times the largest cache of a GPU."""
REPLAYS = 7
GENERATOR = torch.Generator().manual_seed(0)

Work = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codecs", nargs="+", default=["int4-g32", "int8-g128", "fp8"])
    codecs = parser.parse_args().codecs
    kernels = select_device()
    read = memory_rate()
    rows: list[dict[str, Any]] = []

    def note(name: str, works: list[Work], nbytes: int = 0, flops: int = 0) -> None:
        taken = seconds(works)
        row: dict[str, Any] = {"kernel": name, "us": 1e6 * taken}
        if nbytes:
            row |= {"bytes_per_s": nbytes / taken, "share_of_read": nbytes / taken / read}
        if flops:
            row["flops_per_s"] = flops / taken
        rows.append(row)
        print(row, flush=True)

    x = torch.randn(1, HIDDEN, device="cuda")
    for codec in codecs:
        for name, (out, cols) in RESIDENT.items():
            weights, nbytes = turns(codec, out, cols), get_codec(codec).nbytes(out, cols)
            one, many = torch.randn(1, cols, device="cuda"), torch.randn(TOKENS, cols, device="cuda")
            note(f"{name} {codec}, 1 token", [partial(kernels.linear, one, w) for w in weights], nbytes)
            work = partial(kernels.linear, many, weights[0])
            note(f"{name} {codec}, {TOKENS} tokens", [work], flops=2 * TOKENS * out * cols)
        slab, few = experts(codec, 64), torch.empty(TOP_K, HIDDEN, device="cuda")
        for count in (TOP_K, 1):
            works = [partial(kernels.slot_experts, slab, x, slots_of(count), few) for _ in range(16)]
            note(f"{count} experts {codec}, 1 token", works, count * slab.layout.stride)
        slab, many = experts(codec, EXPERTS), torch.randn(TOKENS, HIDDEN, device="cuda")
        slots = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(TOKENS)]).flatten().to(torch.int32).cuda()
        work = partial(kernels.slot_experts, slab, many, slots, torch.empty(TOKENS * TOP_K, HIDDEN, device="cuda"))
        flops = 6 * TOKENS * TOP_K * HIDDEN * WIDTH
        note(f"{EXPERTS} experts {codec}, {TOKENS} tokens", [work], EXPERTS * slab.layout.stride, flops)
        del slab, slots, work
    head = weight("bf16", VOCABULARY, HIDDEN)
    note("head bf16, 1 token", [partial(kernels.linear, x, head)], 2 * VOCABULARY * HIDDEN)
    kv_b, latent = turns("int8-g128", HEADS * 256, RANK), torch.randn(1, HEADS, RANK, device="cuda")
    q, half = torch.randn(1, HEADS, 128, device="cuda"), HEADS * 128 * RANK
    note("absorb_query int8-g128", [partial(kernels.absorb_query, q, w) for w in kv_b], half)
    note("expand_value int8-g128", [partial(kernels.expand_value, latent, w, 128) for w in kv_b], half)
    for past in (512, 8192, 32768):
        cache = torch.randn(past + 1, RANK + ROPE, device="cuda").to(kernels.latent_dtype)
        q_rope = torch.randn(1, HEADS, ROPE, device="cuda")
        at = torch.full((1,), past, dtype=torch.int32, device="cuda")
        work = partial(kernels.mla_at, latent, q_rope, cache, at, past + 1, 0.1)
        note(f"latent attention over {past}", [work], cache.nbytes)
    numbers = {"device": torch.cuda.get_device_name(), "read": read, "kernels": rows}
    append("gpu_speed", "python benchmarks/gpu_speed.py --codecs " + " ".join(codecs), numbers)


def memory_rate() -> float:
    """Bytes per second of device memory."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = 2 * source.numel() / seconds([lambda: target.copy_(source)])
    return max(copy, source.numel() / seconds([lambda: source.view(torch.int64).sum()]))


def seconds(works: list[Work]) -> float:
    """Median seconds of one of `works`, recorded one after the other and replayed."""
    works[0]()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e-3 * begin.elapsed_time(end) / len(works))
    return statistics.median(times[1:])


def turns(codec: str, rows: int, cols: int) -> list[QuantizedTensor]:
    """So many weights that none is in a cache when its turn comes."""
    made = weight(codec, rows, cols)
    count = max(2, min(40, TURN_NBYTES // get_codec(codec).nbytes(rows, cols)))
    copies = ({suffix: part.clone() for suffix, part in made.parts.items()} for _ in range(count))
    return [QuantizedTensor(made.codec, rows, cols, parts) for parts in copies]


def weight(codec: str, rows: int, cols: int) -> QuantizedTensor:
    made = random_weight(codec, rows, cols, GENERATOR)
    return QuantizedTensor(made.codec, rows, cols, {suffix: part.cuda() for suffix, part in made.parts.items()})


def experts(codec: str, slots: int) -> ExpertSlab:
    layout = ExpertLayout(get_codec(codec), HIDDEN, WIDTH)
    raw = random_expert(layout, GENERATOR).ljust(align_up(layout.stride), b"\0")
    one = torch.frombuffer(bytearray(raw), dtype=torch.uint8).cuda()
    return ExpertSlab(layout, one.repeat(slots).view(slots, -1))


def slots_of(count: int) -> Tensor:
    """A token's list of slots, `count` of them here."""
    slots = torch.full((TOP_K,), -1, dtype=torch.int32)
    slots[:count] = torch.randperm(64)[:count]
    return slots.cuda()


if __name__ == "__main__":
    main()
