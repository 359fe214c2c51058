"""Will it run, how fast, and what would help: a model's sizes and a machine's rates become a plan.

Owns the answers of `expertpager plan`; `plan_report` tells them. Pure: sizes come from the caller, rates from a machine
file, hit rates from a curve. The split of RAM is `budget`'s, the one the engine loads with, so plan and run agree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from offload.config import ModelConfig
from offload.errors import BudgetError
from offload.tune.budget import FREE_SHARE, RamPlan, floor_slots, plan_ram, ram_for_slots
from offload.tune.cost import Cost, Footprint, ModelCost, decode_cost, prefill_cost
from offload.tune.hits import CURVES, HitCurve
from offload.tune.layer_clock import Demand
from offload.tune.machine import MachineSpec
from offload.tune.plan_gpu import WORTHWHILE, GpuForecast, plan_gpu
from offload.tune.setting import PROCESS_NBYTES, Setting
from offload.types import format_size

DISK_RESERVE_NBYTES = 1 << 30
_GIB = 1 << 30


@dataclass(frozen=True)
class RecipePlan:
    """One recipe on one machine. `problems` says why it does not run on the processor; then nothing else is known but
    what a GPU would make of it, which needs less RAM."""

    footprint: Footprint
    problems: tuple[str, ...]
    ram: RamPlan | None = None
    share: float = 0.0
    hit: float = 0.0
    """Share of the demands that need no read, ahead or not."""
    decode: Cost | None = None
    decode_flat: Cost | None = None
    prefill: Cost | None = None
    ttft_s: float = 0.0
    gains: tuple[tuple[str, float], ...] = ()
    gpu: GpuForecast | None = None
    conversion_s: float | None = None

    @property
    def runs(self) -> bool:
        return not self.problems


def plan_ram_of(
    footprint: Footprint,
    limit: int,
    context: int,
    *,
    process: int,
    allow_slow: bool = False,
    prefill_chunk: int | None = None,
) -> RamPlan:
    """The split of `limit` bytes that the engine would load with. Raises BudgetError."""
    demand = ram_demand(footprint, context, process)
    return plan_ram(footprint.config, limit=limit, allow_slow=allow_slow, prefill_chunk=prefill_chunk, **demand)


def ram_demand(footprint: Footprint, context: int, process: int) -> dict[str, int]:
    """What the budget needs to know of a model, as the engine says it of an opened store."""
    return {
        "process": process,
        "resident": footprint.resident_nbytes,
        "slot_nbytes": ModelCost.of(footprint).layout.slot_nbytes,
        "context": context,
    }


def ram_limit(footprint: Footprint, machine: MachineSpec, context: int, prefill_chunk: int | None = None) -> int:
    """The budget of a run without --ram: a share of what is free, at most the whole model."""
    demand, experts = ram_demand(footprint, context, PROCESS_NBYTES), ModelCost.of(footprint).expert_count
    everything = ram_for_slots(footprint.config, experts, prefill_chunk=prefill_chunk, **demand)
    return min(PROCESS_NBYTES + int(machine.ram_available * FREE_SHARE), everything)


def plan_recipe(footprint: Footprint, machine: MachineSpec, setting: Setting, curve: HitCurve) -> RecipePlan:
    """One recipe on one machine."""
    config = footprint.config
    context = setting.context_of(config)
    chunk = setting.prefill_chunk
    limit = setting.ram or ram_limit(footprint, machine, context, chunk)
    problems = _disk_problems(footprint, machine)
    gpu = plan_gpu(footprint, machine, setting, curve)
    try:
        slow = setting.allow_slow
        ram = plan_ram_of(footprint, limit, context, process=PROCESS_NBYTES, allow_slow=slow, prefill_chunk=chunk)
    except BudgetError as fault:
        return RecipePlan(footprint, (*problems, str(fault)), gpu=None if problems else gpu)
    if problems:
        return RecipePlan(footprint, problems)
    model = ModelCost.of(footprint)
    share = ram.slots / ram.experts
    demand = _demand(curve, ram.slots, config)
    decode = decode_cost(model, machine, demand, context // 2)
    prompt = min(setting.prompt, context)
    prefill = prefill_cost(model, machine, prompt, ram.chunk, share, curve.alike)
    return RecipePlan(
        footprint,
        (),
        ram,
        share,
        demand.hit,
        decode,
        decode_cost(model, machine, _demand(CURVES["flat"], ram.slots, config), context // 2),
        prefill,
        prefill.total_s,
        _gains(footprint, machine, replace(setting, ram=limit, context=context), curve, decode),
        gpu,
        _conversion_s(footprint, machine),
    )


def _demand(curve: HitCurve, slots: int, config: ModelConfig) -> Demand:
    return curve.demand(slots / (config.n_routed_experts * len(config.moe_layers)))


def _disk_problems(footprint: Footprint, machine: MachineSpec) -> tuple[str, ...]:
    if not footprint.download_nbytes or machine.drive_free is None:
        return ()
    need = footprint.store_nbytes + DISK_RESERVE_NBYTES
    if need <= machine.drive_free:
        return ()
    return (
        f"the store needs {format_size(need)} of disk, {format_size(machine.drive_free)} are free: "
        f"{format_size(need - machine.drive_free)} more, or a recipe with fewer bits",
    )


def _gains(
    footprint: Footprint, machine: MachineSpec, setting: Setting, curve: HitCurve, now: Cost
) -> tuple[tuple[str, float], ...]:
    """Decode tok/s after one change each to a `setting` that leaves nothing open."""
    model, config = ModelCost.of(footprint), footprint.config
    limit, context = setting.ram, setting.context
    assert limit is not None and context is not None

    def speed(spec: MachineSpec = machine, ram: int = limit, cost: ModelCost = model) -> float:
        demand = ram_demand(footprint, context, PROCESS_NBYTES) | {"slot_nbytes": cost.layout.slot_nbytes}
        slots = plan_ram(config, limit=ram, allow_slow=True, prefill_chunk=setting.prefill_chunk, **demand).slots
        return decode_cost(cost, spec, _demand(curve, slots, config), context // 2).tok_s

    faster = replace(
        machine,
        ram_read=2 * machine.ram_read,
        formats={name: replace(rate, read=2 * rate.read) for name, rate in machine.formats.items()},
    )
    found = [
        ("8 GiB more RAM", speed(ram=limit + 8 * _GIB)),
        ("32 GiB more RAM", speed(ram=limit + 32 * _GIB)),
        ("1 GB/s more from the drive", speed(replace(machine, drive_read=machine.drive_read + 1e9))),
        ("a drive twice as fast", speed(replace(machine, drive_read=2 * machine.drive_read))),
        ("RAM and processor twice as fast", speed(faster)),
    ]
    if model.experts in ("fp8", "int8-g128", "bf16"):
        found.append(("experts in int4-g32", speed(cost=replace(model, experts="int4-g32"))))
    elif model.experts == "int4-g32":
        found.append(("experts in int4-g128", speed(cost=replace(model, experts="int4-g128"))))
    return tuple((what, tok_s) for what, tok_s in found if tok_s > now.tok_s * WORTHWHILE)


def _conversion_s(footprint: Footprint, machine: MachineSpec) -> float | None:
    """Download, requantizing and writing overlap: the slowest decides. None where no rate is known."""
    if not footprint.download_nbytes:
        return None
    rates = [rate for rate in (machine.download, machine.encode) if rate]
    return footprint.download_nbytes / min(rates) if rates else None


def least_ram(footprint: Footprint, setting: Setting) -> int:
    """The smallest --ram with a slot for every expert that one token uses."""
    config = footprint.config
    context = setting.context_of(config)
    slots = min(floor_slots(config), ModelCost.of(footprint).expert_count)
    demand = ram_demand(footprint, context, PROCESS_NBYTES)
    return ram_for_slots(config, slots, prefill_chunk=setting.prefill_chunk, **demand)
