"""The device tier on true-shape DeepSeek-V3 layers, beside what the hardware can do.

    python benchmarks/gpu.py --folder SCRATCH [--vram 24GB 32GB] [--ram 48GiB] [--layers 4] [--baselines]
    python benchmarks/gpu.py --tiny            the same code on a simulated device: no figure of it means anything

Builds one dense and `--layers` MoE layers (hidden 7168, 256 experts x 2048, MLA with 128 heads, int4-g32 experts, int8
resident weights, synthetic values), loads them under each VRAM budget and records, one row per budget:
  read            bytes per second of device memory, measured here: the better of a reduction and of copies within it
  link            bytes per second of copies from page-locked memory, measured here
  experts         resident experts at decode: bytes per second, share of `read`
  copies          expert copies while decoding: bytes per second, share of `link`
  decode          per share of planted hits (0 to 100%): measured step, max of link and device times, their ratio; the
                  hit share under skewed routing; what a layer takes beyond the bound
  prefill         one long chunk: seconds, and the sweep bound of the copies it needs
  61 layers       the step's time per layer times DeepSeek-V3's 61: an extrapolation, no measurement
`--baselines` adds rows of accelerate's CPU offload of transformers' model (bf16) on the same layers and budget, and of
kt-kernel's experts on the CPU beside ours, or the reason why they did not run.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from gpu_baselines import accelerate_offload, kt_kernel  # noqa: E402
from gpu_model import PlantedChoice, PlantedRouting, SyntheticStore, SyntheticWeights, model_config  # noqa: E402
from record import append  # noqa: E402

from offload.config import ModelConfig  # noqa: E402
from offload.kernels import select, select_device  # noqa: E402
from offload.kernels.device import FEW_TOKENS  # noqa: E402
from offload.model.kv_cache import KVCache  # noqa: E402
from offload.model.place import Place  # noqa: E402
from offload.model.single_token import SingleToken  # noqa: E402
from offload.model.transformer import DeepseekV3  # noqa: E402
from offload.model.weights import PlacedWeights, load_weights  # noqa: E402
from offload.tiers.device import Device  # noqa: E402
from offload.tiers.device_executor import DeviceExecutor, DeviceShare  # noqa: E402
from offload.tiers.simulated import SimulatedDevice  # noqa: E402
from offload.tiers.vram_memory import lent_slots, slot_nbytes  # noqa: E402
from offload.tune.probe_gpu import read_rate  # noqa: E402
from offload.tune.vram_budget import DeviceDemand, VramPlan, plan_vram  # noqa: E402
from offload.types import parse_size  # noqa: E402

HITS = (0.0, 0.25, 0.5, 0.75, 1.0)
PROBE_S = 0.5
"""Seconds for the bandwidth of device memory."""
V3_LAYERS = 61


@dataclass
class Sizes:
    """How much is run."""

    context: int
    chunk: int
    steps: int
    probe_nbytes: int


@dataclass
class Bench:
    """A loaded model under one budget."""

    device: Device
    config: ModelConfig
    store: SyntheticStore
    executor: DeviceExecutor
    model: DeepseekV3
    cache: KVCache
    choice: PlantedChoice
    routing: PlantedRouting
    plan: VramPlan
    sizes: Sizes

    def step(self, tokens: int = 1) -> float:
        """Seconds of a forward pass over `tokens` tokens."""
        if self.cache.length + tokens > self.cache.capacity:
            self.cache.truncate(0)
        with self.device.guard():
            self.routing.prepare(tokens, self.config.num_experts_per_tok)
        self.sync()
        begun = time.perf_counter()
        hidden = self.model.forward([n % self.config.vocab_size for n in range(tokens)], self.cache)
        self.model.logits(hidden[-1:])
        self.sync()
        return time.perf_counter() - begun

    def sync(self) -> None:
        with self.device.guard():
            self.device.synchronize()


def main() -> None:
    arguments = parse()
    if arguments.tiny:
        sizes = Sizes(context=64, chunk=32, steps=3, probe_nbytes=1 << 20)
    else:
        sizes = Sizes(context=8192, chunk=2048, steps=32, probe_nbytes=1 << 30)
    config_dict = model_config(arguments.layers, arguments.tiny)
    with tempfile.TemporaryDirectory(prefix="expertpager-gpu-") as temporary:
        folder = arguments.folder or Path(temporary)
        store = SyntheticStore.write(folder, ModelConfig.from_hf(config_dict))
        for vram in arguments.vram:
            numbers = one_budget(store, parse_size(vram), arguments, sizes)
            command = f"python benchmarks/gpu.py --vram {vram} --ram {arguments.ram} --layers {arguments.layers}"
            report(arguments, command, numbers)
            if arguments.baselines:
                for run in (accelerate_offload, kt_kernel):
                    gc.collect()  # what ran before gives its memory back
                    limit, where = parse_size(vram), "cpu" if arguments.tiny else "cuda:0"
                    found = attempt(run.__name__, arguments, partial(run, config_dict, limit, sizes.steps, where))
                    report(arguments, f"{command} --baselines", {"baseline": run.__name__} | found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the experts are written (6.3 GB per layer)")
    parser.add_argument("--vram", nargs="+", default=["24GB", "32GB"])
    parser.add_argument("--ram", default="48GiB", help="for expert slots")
    parser.add_argument("--layers", type=int, default=4, help="MoE layers")
    parser.add_argument("--split", choices=["gpu", "hybrid"], default="gpu")
    parser.add_argument("--baselines", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="small sizes on a simulated device; records nothing")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.vram, arguments.ram = ["1MiB"], "1MiB"
    return arguments


def report(arguments: argparse.Namespace, command: str, numbers: dict[str, Any]) -> None:
    if not arguments.tiny:
        append("gpu", command, numbers)
    print(json.dumps(numbers, indent=1))


def attempt(name: str, arguments: argparse.Namespace, work: Callable[[], Any]) -> Any:
    """What `work` finds; the fault if it fails: time on a GPU is short, and the other figures are worth having."""
    begun = time.perf_counter()
    try:
        return work()
    except Exception as fault:
        if arguments.tiny:
            raise
        traceback.print_exc()
        return {"failed": f"{type(fault).__name__}: {fault}"[:500]}
    finally:
        print(f"{name}: {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)


def one_budget(store: SyntheticStore, vram: int, arguments: argparse.Namespace, sizes: Sizes) -> dict[str, Any]:
    """All measurements under one VRAM budget."""
    bench = load(store, vram, arguments, sizes)
    try:
        some = partial(attempt, arguments=arguments)
        numbers: dict[str, Any] = {
            "device": bench.device.name,
            "simulated": arguments.tiny,
            "plan": {**asdict(bench.plan), "layers": len(bench.plan.layers), "total": bench.plan.total},
            "ram_slots": bench.executor.ram.residency.slots,
            "split": arguments.split,
            "read": memory_rate(bench),
            "link": link_rate(bench),
        }
        fill(bench)
        numbers["experts"] = some("experts", work=lambda: resident_experts(bench, numbers["read"]))
        numbers["decode"] = some("decode", work=lambda: decode(bench, numbers))
        numbers["copies"] = some("copies", work=lambda: copies(bench, numbers["link"]))
        numbers["skewed"] = some("skewed", work=lambda: skewed(bench))
        numbers["prefill"] = some("prefill", work=lambda: prefill(bench, numbers["link"]))
        numbers["61 layers, extrapolated"] = some("61 layers", work=lambda: extrapolate(bench, numbers))
        numbers["peak_vram_bytes"] = bench.device.peak_nbytes()
        return numbers
    finally:
        bench.executor.close()


def load(store: SyntheticStore, vram: int, arguments: argparse.Namespace, sizes: Sizes) -> Bench:
    """Everything set aside from one budget, as the engine does it."""
    config = store.config
    device: Device
    if arguments.tiny:
        device = SimulatedDevice()
        processor, kernels = select("reference"), select_device("reference")
    else:
        from offload.tiers.cuda import CudaDevice

        device = CudaDevice(0)
        processor, kernels = select(), select_device()
    weights = SyntheticWeights(config)
    layers = range(config.num_hidden_layers)
    resident = sum(weights.nbytes(layer) for layer in layers) + weights.nbytes(None)
    attention = config.num_attention_heads, config.kv_lora_rank, sizes.context
    scratch = (kernels.scratch_nbytes(tokens, *attention) for tokens in (FEW_TOKENS, 1))
    demand = DeviceDemand(
        layers, resident, sizes.context, sizes.chunk, *scratch, latent_itemsize=kernels.latent_dtype.itemsize
    )
    nbytes = slot_nbytes(store.layout)
    lendable = lent_slots(store.layout, sizes.chunk, config.num_experts_per_tok)
    rest = {"name": device.name, "slot_nbytes": nbytes, "lendable": lendable}
    rest |= {"driver": device.driver_nbytes, "rounding": device.rounding_nbytes}
    plan = plan_vram(config, demand, limit=vram, **rest)
    if arguments.tiny:  # slots for half of the experts, whatever everything else takes
        plan = plan_vram(config, demand, limit=plan.fixed + plan.experts // 2 * nbytes, **rest)
    device.limit(plan.total - plan.driver)
    places = [Place(device.torch_device, device.guard, device.record, device.call, device.sender)] * len(layers)
    loaded = load_weights(PlacedWeights(weights, places), config)
    cache = KVCache(config, sizes.context, [place.device for place in places], kernels.latent_dtype)
    executor = DeviceExecutor(
        store,
        [DeviceShare(device, kernels, config.moe_layers, plan.slots, plan.lent > 0)],
        slots=parse_size(arguments.ram) // store.layout.slot_nbytes,
        max_tokens=sizes.chunk,
        below=processor if arguments.split == "hybrid" else None,
        policy="ema",
        allow_slow=True,
    )
    residency, first = executor.tiers[0].residency, config.moe_layers[0]
    choice = PlantedChoice(config, lambda layer, expert: residency.slot(layer - first, expert))
    routing = PlantedRouting(executor, choice, device)
    model = DeepseekV3(config, loaded, kernels, routing, sizes.context, places)
    model.single = SingleToken(model, routing, kernels, cache)  # as the engine does
    return Bench(device, config, store, executor, model, cache, choice, routing, plan, sizes)


def fill(bench: Bench) -> None:
    """Bring experts into RAM and as many into VRAM as there are slots, the same number for every layer."""
    tier, ram = bench.executor.tiers[0], bench.executor.ram
    share = min(tier.residency.slots // len(tier.layers), bench.config.n_routed_experts)
    for layer in tier.layers:
        experts = list(range(min(bench.config.n_routed_experts, ram.residency.slots // len(tier.layers))))
        ram.complete(ram.open(layer, experts), lambda there: None)
    with bench.device.guard():
        for layer in tier.layers:
            tier.load(layer, list(range(share)))


# -- what the hardware can do ----------------------------------------------------------------


def seconds(bench: Bench, work: Callable[[], object], repeats: int) -> float:
    """Median seconds of `work`, the device waited for."""
    times = []
    for _ in range(repeats + 2):
        bench.sync()
        begun = time.perf_counter()
        with bench.device.guard():
            work()
        bench.sync()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[2:])


def memory_rate(bench: Bench) -> float:
    """Bytes per second of the slab, the memory that experts lie in."""
    data = bench.executor.tiers[0].slab.data.view(-1)
    with bench.device.guard():
        return read_rate(bench.device, data[: min(data.numel(), bench.sizes.probe_nbytes) // 8 * 8], PROBE_S)


def link_rate(bench: Bench) -> float:
    """Bytes per second of copies of one expert's size, back to back, out of the RAM tier's slots."""
    tier, pool, stride = bench.executor.tiers[0], bench.executor.ram.pool, bench.store.layout.stride
    count = min(pool.slots, tier.residency.slots, 32)

    def work() -> None:
        for slot in range(count):
            bench.device.copies.copy(tier.slab.data[slot, :stride], pool.tensor(slot)[:stride])

    return count * stride / seconds(bench, work, 8)


# -- what is made of it ----------------------------------------------------------------------


def resident_experts(bench: Bench, read: float) -> dict[str, float]:
    """The routed part of decoding with everything resident: kernels of all layers, one after the other."""
    tier, k = bench.executor.tiers[0], bench.config.num_experts_per_tok
    x = torch.randn(1, bench.config.hidden_size).to(bench.device.torch_device)
    most = tier.residency.slots // k * k
    lists = torch.randperm(most)[: max(k, most)].to(torch.int32).view(-1, k).to(bench.device.torch_device)
    kernels = bench.executor.kernels[0]

    def work() -> None:
        for slots in lists:
            kernels.slot_experts(tier.slab, x, slots, tier.partial(k))

    rate = lists.numel() * bench.store.layout.stride / seconds(bench, work, 5)
    return {"bytes_per_s": rate, "share_of_read": rate / read}


def decode(bench: Bench, numbers: dict[str, Any]) -> list[dict[str, float]]:
    """Steps with planted hit shares against max(link times)."""
    rows = []
    k, layers, stride = bench.config.num_experts_per_tok, len(bench.config.moe_layers), bench.store.layout.stride
    full = bench.plan.slots >= bench.plan.experts
    for hits in HITS if not full else (1.0,):
        bench.choice.hits = hits
        tier = bench.executor.tiers[0]
        bench.step()
        before, below = tier.counters(), bench.executor.ram.counters().ram.misses
        step = statistics.median(bench.step() for _ in range(bench.sizes.steps))
        spent = tier.counters().minus(before)
        # What was not there when a step began: part of it may have come on speculation before it was demanded.
        copied = (1.0 - hits) * layers * k * stride / numbers["link"]
        on_device = (layers * k * stride + bench.plan.resident) / numbers["read"]
        bound = max(copied, on_device)
        rows.append(
            {
                "planted_hits": hits,
                "hits": spent.hit_rate,
                "step_s": step,
                "link_s": copied,
                "device_s": on_device,
                "bound_s": bound,
                "step_over_bound": step / bound,
                "gap_per_layer_s": (step - bound) / bench.config.num_hidden_layers,
                "ram_misses": bench.executor.ram.counters().ram.misses - below,
            }
        )
    bench.choice.hits = None
    return rows


def copies(bench: Bench, link: float) -> dict[str, float]:
    """Expert copies while decoding without hits."""
    tier = bench.executor.tiers[0]
    bench.choice.hits = 0.0
    before = tier.counters()
    wall = sum(bench.step() for _ in range(bench.sizes.steps))
    spent = tier.counters().minus(before)
    bench.choice.hits = None
    return {
        "bytes_per_s": spent.bandwidth,
        "share_of_link": spent.bandwidth / link,
        "link_busy_share_of_step": spent.read_s / wall,
    }


def skewed(bench: Bench) -> dict[str, float]:
    """Decoding with routing of planted skew, after as many steps to learn it."""
    for _ in range(bench.sizes.steps):
        bench.step()
    before = bench.executor.tiers[0].counters()
    step = statistics.median(bench.step() for _ in range(bench.sizes.steps))
    return {"step_s": step, "hits": bench.executor.tiers[0].counters().minus(before).hit_rate}


def prefill(bench: Bench, link: float) -> dict[str, float]:
    """One chunk against the copies it needs, the second of its kind: the first compiles kernels."""
    tier = bench.executor.tiers[0]
    bench.cache.truncate(0)
    bench.step(bench.sizes.chunk)
    bench.cache.truncate(0)
    before = tier.counters()
    taken = bench.step(bench.sizes.chunk)
    misses = tier.counters().minus(before).misses
    bound = misses * bench.store.layout.stride / link
    bench.cache.truncate(0)
    return {
        "tokens": bench.sizes.chunk,
        "seconds": taken,
        "copied_experts": misses,
        "sweep_bound_s": bound,
        "over_bound": taken / bound if bound else 0.0,
    }


def extrapolate(bench: Bench, numbers: dict[str, Any]) -> dict[str, Any]:
    """DeepSeek-V3 from the time per layer of these layers, head included. No measurement."""
    per_layer = {
        row["planted_hits"]: row["step_s"] / bench.config.num_hidden_layers for row in numbers["decode"]
    }
    chunk = numbers["prefill"]["seconds"] / bench.config.num_hidden_layers * V3_LAYERS
    return {
        "decode_tok_s_by_hits": {str(hits): 1 / (t * V3_LAYERS) for hits, t in per_layer.items()},
        "prefill_tok_s": bench.sizes.chunk / chunk,
    }


if __name__ == "__main__":
    main()
