"""What the machine's GPU would hold and how fast it would be: `--device cuda`, foretold.

Owns the GPU's part of the answers of `expertpager plan`. Pure. The splits of VRAM and RAM are those that the engine
loads with (`vram_budget`, `budget`), the seconds `gpu_cost`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from offload.errors import BudgetError
from offload.kernels.device import GPU_LATENT_DTYPE, latent_scratch_nbytes
from offload.tiers.cuda_memory import DRIVER_NBYTES, rounding_nbytes
from offload.tiers.vram_memory import lent_slots, slot_nbytes
from offload.tune.budget import FREE_SHARE, RamPlan, longest_chunk, plan_ram, ram_for_slots
from offload.tune.cost import Footprint, ModelCost
from offload.tune.gpu_cost import GpuCost, GpuDemand, gpu_decode_cost, gpu_prefill_cost
from offload.tune.hits import HitCurve
from offload.tune.machine import FormatRate, Gpu, MachineSpec
from offload.tune.setting import Setting
from offload.tune.vram_budget import DEVICE_CHUNK, VramPlan, default_limit, device_demand, plan_vram

GPU_PROCESS_NBYTES = 680 << 20
"""RAM of a process that uses a GPU before a model is loaded, as seen with an H100; the engine measures its own."""

WORTHWHILE = 1.01
"""A change that gains less than this is not worth naming."""

_GIB = 1 << 30


@dataclass(frozen=True)
class GpuForecast:
    """The model on the machine's GPU. `problem` says why it does not run there; then nothing else is known."""

    name: str
    rests_on: str
    """Where the rates come from, for people."""
    problem: str | None = None
    vram: VramPlan | None = None
    ram: RamPlan | None = None
    split: str = Setting.split
    """Who computes what VRAM lacks."""
    vram_hit: float = 0.0
    """Share of the demands of decoding whose expert is in VRAM."""
    hit: float = 0.0
    """The same in VRAM or RAM: they need no read."""
    decode: GpuCost | None = None
    prefill: GpuCost | None = None
    gains: tuple[tuple[str, float], ...] = ()

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token after the prompt."""
        return self.prefill.total_s if self.prefill else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        values: dict[str, Any] = {"name": self.name, "rests_on": self.rests_on, "problem": self.problem}
        if self.vram is None or self.ram is None or self.decode is None or self.prefill is None:
            return values
        return values | {
            "vram": {**asdict(self.vram), "layers": [*self.vram.layers], "total": self.vram.total},
            "ram": {**asdict(self.ram), "total": self.ram.total},
            "split": self.split,
            "vram_hit": self.vram_hit,
            "hit": self.hit,
            "decode_tok_s": self.decode.tok_s,
            "decode": asdict(self.decode),
            "bound_by": self.decode.binding,
            "prefill_tok_s": self.prefill.tok_s,
            "prefill": asdict(self.prefill),
            "ttft_s": self.ttft_s,
            "gains": dict(self.gains),
        }


def plan_gpu(footprint: Footprint, machine: MachineSpec, setting: Setting, curve: HitCurve) -> GpuForecast | None:
    """The forecast; None on a machine without a GPU."""
    if machine.gpu is None:
        return None
    name, model = machine.gpu.name, ModelCost.of(footprint)
    rests_on = origin(machine.gpu, model)
    try:
        loaded = _load(footprint, model, machine, setting)
    except BudgetError as fault:
        return GpuForecast(name, rests_on, str(fault))
    decode = loaded.decode(model, machine, curve)
    demand = loaded.demand(curve)
    return GpuForecast(
        name,
        rests_on,
        None,
        loaded.vram,
        loaded.ram,
        setting.split,
        demand.vram,
        demand.below.hit,
        decode,
        loaded.prefill(model, machine, min(setting.prompt, loaded.context), curve),
        tuple(_gains(footprint, model, machine, setting, curve, decode, loaded)),
    )


def origin(gpu: Gpu, model: ModelCost) -> str:
    """Where the rates for `model` come from."""
    if model.experts in gpu.experts and model.resident in gpu.resident:
        return "kernels measured here"
    if model.experts in gpu.experts or model.resident in gpu.resident or (gpu.kernels and model.experts == "int4-g32"):
        return "kernels measured here in part, the others from the shares of memory that an H200 and an H100 reached"
    return "shares of the memory's rate that kernels reached on an H200 and an H100, nothing measured here"


def vram_limit(gpu: Gpu) -> int:
    """The budget of a run without --vram, in bytes."""
    return default_limit(gpu.vram - DRIVER_NBYTES if gpu.free is None else gpu.free, DRIVER_NBYTES)


@dataclass(frozen=True)
class _Loaded:
    """A model as the engine would load it."""

    vram: VramPlan
    ram: RamPlan
    context: int
    hybrid: bool

    def demand(self, curve: HitCurve) -> GpuDemand:
        return GpuDemand.expected(curve, self.vram.slots / self.vram.experts, self.ram.slots / self.ram.experts)

    def decode(self, model: ModelCost, machine: MachineSpec, curve: HitCurve) -> GpuCost:
        return gpu_decode_cost(model, machine, self.demand(curve), self.context // 2, hybrid=self.hybrid)

    def prefill(self, model: ModelCost, machine: MachineSpec, prompt: int, curve: HitCurve) -> GpuCost:
        vram = prompt_share([self.vram])
        return gpu_prefill_cost(
            model, machine, prompt, self.ram.chunk, vram, max(vram, self.ram.slots / self.ram.experts), curve.alike
        )


def prompt_share(plans: Sequence[VramPlan]) -> float:
    """Share of the experts, 0..1, that have a slot while a long prompt borrows some."""
    slots, experts = (sum(getattr(plan, name) for plan in plans) for name in ("slots", "experts"))
    return (slots - sum(plan.lent for plan in plans)) / experts if experts else 1.0


def _load(footprint: Footprint, model: ModelCost, machine: MachineSpec, setting: Setting) -> _Loaded:
    """Both splits. Raises BudgetError where one of them is too small."""
    gpu, config = machine.gpu, footprint.config
    assert gpu is not None
    context = setting.context_of(config)
    chunk = min(DEVICE_CHUNK, longest_chunk(context, setting.prefill_chunk))
    vram = plan_vram(
        config,
        device_demand(
            config,
            range(config.num_hidden_layers),
            resident=footprint.resident_nbytes - model.embedding_nbytes,
            context=context,
            chunk=chunk,
            scratch=latent_scratch_nbytes,
            latent_itemsize=GPU_LATENT_DTYPE.itemsize,
        ),
        name=gpu.name,
        limit=setting.vram or vram_limit(gpu),
        slot_nbytes=slot_nbytes(model.layout),
        lendable=lent_slots(model.layout, chunk, config.num_experts_per_tok),
        driver=DRIVER_NBYTES,
        rounding=rounding_nbytes,
    )
    # The embedding stays in RAM; the cache and the activations do not lie there.
    demand = {"process": GPU_PROCESS_NBYTES, "resident": model.embedding_nbytes, "context": 1}
    demand["slot_nbytes"] = model.layout.slot_nbytes
    free = GPU_PROCESS_NBYTES + int(machine.ram_available * FREE_SHARE)
    limit = setting.ram or min(free, ram_for_slots(config, model.expert_count, **demand))
    ram = plan_ram(config, limit=limit, allow_slow=setting.allow_slow, **demand)
    return _Loaded(vram, replace(ram, chunk=chunk), context, setting.split == "hybrid")


def _gains(
    footprint: Footprint,
    model: ModelCost,
    machine: MachineSpec,
    setting: Setting,
    curve: HitCurve,
    now: GpuCost,
    loaded: _Loaded,
) -> list[tuple[str, float]]:
    """Decode tok/s after one change each."""
    gpu = machine.gpu
    assert gpu is not None
    limit = setting.vram or vram_limit(gpu)
    given = replace(setting, vram=limit, ram=loaded.ram.total + loaded.ram.slot_nbytes - 1, allow_slow=True)

    def memory(cost: ModelCost = model, asked: Setting = given) -> float:
        try:
            return _load(footprint, cost, machine, asked).decode(cost, machine, curve).tok_s
        except BudgetError:
            return 0.0

    def link() -> MachineSpec:
        return replace(machine, gpu=replace(gpu, h2d=2 * gpu.h2d))

    assert given.ram is not None
    other = "gpu" if loaded.hybrid else "hybrid"
    found = [
        (f"--split {other}", replace(loaded, hybrid=other == "hybrid").decode(model, machine, curve).tok_s),
        ("8 GiB more VRAM", memory(asked=replace(given, vram=limit + 8 * _GIB))),
        ("32 GiB more RAM", memory(asked=replace(given, ram=given.ram + 32 * _GIB))),
        ("a link twice as fast", loaded.decode(model, link(), curve).tok_s),
        ("a drive twice as fast", loaded.decode(model, _faster_drive(machine), curve).tok_s),
        ("a GPU twice as fast", loaded.decode(model, replace(machine, gpu=_faster(gpu, model)), curve).tok_s),
    ]
    fewer = {"int4-g32": "int4-g128"} | dict.fromkeys(("fp8", "int8-g128", "bf16"), "int4-g32")
    if model.experts in fewer:
        codec = fewer[model.experts]
        found.append((f"experts in {codec}", memory(replace(model, experts=codec))))
    return [(what, tok_s) for what, tok_s in found if tok_s > now.tok_s * WORTHWHILE]


def _faster_drive(machine: MachineSpec) -> MachineSpec:
    depths = {depth: 2 * rate for depth, rate in machine.depths.items()}
    return replace(machine, drive_read=2 * machine.drive_read, depths=depths)


def _faster(gpu: Gpu, model: ModelCost) -> Gpu:
    """Kernels of twice the rates; launches and decisions take what they take."""

    def twice(rate: FormatRate) -> FormatRate:
        return FormatRate(2 * rate.read, 2 * rate.gflops)

    return replace(
        gpu,
        read=2 * gpu.read,
        attention_gflops=2 * gpu.past_gflops,
        experts={model.experts: twice(gpu.expert_rate(model.experts))},
        resident={codec: twice(gpu.resident_rate(codec)) for codec in {model.resident, model.head}},
    )
