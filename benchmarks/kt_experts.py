"""kt-kernel's routed experts on the CPU beside ours, in turns: one token of one MoE layer, weights in RAM.

    python benchmarks/kt_experts.py [--experts 64] [--steps 32]        prints a row, records nothing

`gpu.py --baselines` runs it as a process of its own, and its row says what became of it: kt-kernel 0.6.1 from PyPI is
built for processors with AMX and AVX512-FP16, whatever its variant is called, and elsewhere dies of SIGILL.

The wheel has no CUDA in it (no `submit_with_cuda_stream`), which `KTMoEWrapper.forward` needs. So the extension is
called as kt-kernel's own benchmark of experts does (`submit`, `sync`). Weights are quantized from memory, nothing is
written. A step takes the next k of the experts in a circle that no cache holds. Both compute the weighted sum.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from gpu_model import model_config, random_expert  # noqa: E402

from offload.kernels import select  # noqa: E402
from offload.kernels.native import usable_cpus  # noqa: E402
from offload.quant import get_codec  # noqa: E402
from offload.store.layout import ExpertLayout  # noqa: E402
from offload.tiers.host import SlotPool, SlotWeights  # noqa: E402

METHODS = {"AMXINT4": ("AMXInt4_MOE", 4), "AMXINT8": ("AMXInt8_MOE", 8)}
"""Class and bits per weight of kt-kernel's methods that quantize from memory, the one to prefer first."""
TURNS = 8
REST_S = 0.1
"""Between turns: kt-kernel's threads spin for 50 ms after their work and would take ours the cores."""
WARM_UP = 3
"""Steps of a turn that are not counted: threads wake up."""

Step = Callable[[int], torch.Tensor]
"""Computes the i-th step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=json.loads, default=model_config(1, False), help="JSON; DeepSeek-V3's sizes")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=32, help="per turn")
    arguments = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # kt-kernel prints to the standard output, which is for the row
    print(json.dumps(compare(arguments.config, arguments.experts, arguments.steps)), file=out, flush=True)


def compare(config: dict[str, Any], experts: int, steps: int) -> dict[str, Any]:
    """The row: kt-kernel at the number of threads that suits it best, and ours."""
    cpus = usable_cpus()
    theirs = KtExperts(config, experts)
    ours, ours_nbytes, about = our_experts(config, experts)  # before kt-kernel binds threads and memory to nodes
    # Beside its threads kt-kernel has one that distributes and one that waits, all of which spin.
    by_threads = {n: theirs.step(n) for n in sorted({max(1, cpus - less) for less in (0, 1, 2, 4)})}
    found = {n: turn(step, steps) for n, step in by_threads.items()}
    best = min(found, key=lambda n: statistics.median(found[n]))
    kt_turns, our_turns = [], []
    for _ in range(TURNS):
        kt_turns.append(turn(by_threads[best], steps))
        our_turns.append(turn(ours, steps))
    kt_s, our_s = (statistics.median(chain.from_iterable(turns)) for turns in (kt_turns, our_turns))
    ratios = [statistics.median(a) / statistics.median(b) for a, b in zip(kt_turns, our_turns, strict=True)]
    return {
        "layer_s": kt_s,
        "bytes": theirs.nbytes,
        "bytes_per_s": theirs.nbytes / kt_s,
        "threads": best,
        "layer_s_by_threads": {str(n): statistics.median(times) for n, times in found.items()},
        **theirs.about,
        "experts_in_ram": experts,
        "ours": {"layer_s": our_s, "bytes": ours_nbytes, "bytes_per_s": ours_nbytes / our_s, **about},
        "kt_over_ours": statistics.median(ratios),
        "kt_over_ours_by_turn": ratios,
    }


def turn(step: Step, steps: int) -> list[float]:
    """Seconds of each of `steps` consecutive steps."""
    time.sleep(REST_S)
    times = []
    for i in range(WARM_UP + steps):
        begun = time.perf_counter()
        step(i)
        times.append(time.perf_counter() - begun)
    return times[WARM_UP:]


class KtExperts:
    """kt-kernel's experts, quantized anew for every number of threads: its threads own what they compute."""

    def __init__(self, config: dict[str, Any], experts: int) -> None:
        import kt_kernel

        self._extension = kt_kernel.kt_kernel_ext
        classes = self._extension.moe
        method = next((name for name, (cls, _) in METHODS.items() if hasattr(classes, cls)), None)
        if method is None:
            raise SystemExit(f"this build of kt-kernel ({kt_kernel.__cpu_variant__}) has none of {', '.join(METHODS)}")
        cls, bits = METHODS[method]
        self._class = getattr(classes, cls)
        self._experts, self._k = experts, config["num_experts_per_tok"]
        self._hidden, self._inner = config["hidden_size"], config["moe_intermediate_size"]
        # Values do not matter, so one tensor is gate, up and down: each is quantized into memory of its own.
        self._weights = torch.empty(experts * self._hidden * self._inner, dtype=torch.bfloat16)
        sample = (torch.randn(1_000_003) * 0.02).to(torch.bfloat16)  # drawing billions would take minutes
        for part in self._weights.split(sample.numel()):
            part.copy_(sample[: part.numel()])
        self._on_gpu = torch.zeros(experts, dtype=torch.bool)
        self._order = torch.arange(experts)
        self.nodes = numa_nodes()
        scales = 4 * (2 * self._inner + self._hidden)  # float32, one per row
        self.nbytes = self._k * (3 * self._hidden * self._inner * bits // 8 + scales)
        self.about = {
            "method": method,
            "cpu_variant": kt_kernel.__cpu_variant__,
            "version": kt_kernel.__version__,
            "cuda_build": hasattr(self._extension.CPUInfer, "submit_with_cuda_stream"),
            "numa_nodes": self.nodes,
        }

    def step(self, threads: int) -> Step:
        """One token on `threads` threads."""
        pools = self._extension.WorkerPoolConfig()
        nodes = self.nodes[:threads]
        pools.subpool_count, pools.subpool_numa_map = len(nodes), nodes
        pools.subpool_thread_count = [len(range(i, threads, len(nodes))) for i in range(len(nodes))]
        infer = self._extension.CPUInfer(pools)
        settings = self._extension.moe.MOEConfig(
            self._experts, self._k, self._hidden, self._inner, self._on_gpu.data_ptr()
        )
        settings.layer_idx, settings.pool, settings.max_len = 0, infer.backend_, 128
        settings.save = settings.load = False
        settings.gate_proj = settings.up_proj = settings.down_proj = self._weights.data_ptr()
        layer = self._class(settings)
        infer.submit(layer.load_weights_task(self._order.data_ptr()))
        infer.sync()
        x = torch.randn(1, self._hidden).to(torch.bfloat16)
        weights, count = torch.full((1, self._k), 1 / self._k), torch.tensor([1])
        out = torch.zeros(1, self._hidden, dtype=torch.bfloat16)
        chosen = circle(self._experts, self._k)

        def run(i: int) -> torch.Tensor:
            ids = chosen[i % len(chosen)]
            pointers = (tensor.data_ptr() for tensor in (ids, weights, x, out))
            infer.submit(layer.forward_task(count.data_ptr(), self._k, *pointers, False))
            infer.sync()
            return out

        run(0)
        if not out.isfinite().all() or not out.any():
            raise SystemExit("kt-kernel's result is zero or not finite")
        return run


def our_experts(config: dict[str, Any], experts: int) -> tuple[Step, int, dict[str, Any]]:
    """A step of ours in int4-g32 on every core, its bytes, and what it is."""
    codec, k = get_codec("int4-g32"), config["num_experts_per_tok"]
    layout = ExpertLayout(codec, config["hidden_size"], config["moe_intermediate_size"])
    pool = SlotPool(experts, layout.stride)
    pattern = torch.frombuffer(bytearray(random_expert(layout, torch.Generator().manual_seed(0))), dtype=torch.uint8)
    for slot in range(experts):
        pool.tensor(slot)[: layout.stride] = pattern
    kernels, slots = select(), SlotWeights(layout, pool)
    x, partial = torch.randn(1, layout.hidden_size), torch.empty(k, layout.hidden_size)
    weights, positions = torch.full((1, k), 1 / k), [torch.tensor([j]) for j in range(k)]
    chosen = circle(experts, k)

    def run(i: int) -> torch.Tensor:
        ids = chosen[i % len(chosen)]
        kernels.experts(x, [(slots[e], positions[j]) for j, e in enumerate(ids[0].tolist())], k, partial)
        return kernels.combine(partial, ids, weights)

    about = {"format": codec.name, "kernels": kernels.name}
    about |= {name: getattr(kernels, name) for name in ("isa", "threads") if hasattr(kernels, name)}
    return run, k * layout.stride, about


def circle(experts: int, k: int) -> list[torch.Tensor]:
    """ids int64 [1, k] of consecutive steps, none of which shares an expert with its neighbours."""
    return list(torch.arange(experts // k * k).view(-1, 1, k))


def numa_nodes() -> list[int]:
    """The memory nodes of the cores this process may use."""
    cpus = os.sched_getaffinity(0)
    nodes = [int(path.name[4:]) for path in Path("/sys/devices/system/node").glob("node[0-9]*")]
    own = [n for n in sorted(nodes) if any(Path(f"/sys/devices/system/node/node{n}/cpu{c}").exists() for c in cpus)]
    return own or [0]


if __name__ == "__main__":
    main()
