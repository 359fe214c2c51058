"""What computes: the processor alone, or devices with expert slots of their own.

Owns the order of loading: plan first, then allocate exactly what was planned. The numbers come from `budget` and
`vram_budget`, the maths from `model`, the paging from `tiers`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from offload.cache.trace import Trace
from offload.engine.devices import device_kernels
from offload.engine.dispatch import dispatch_layers
from offload.engine.options import RuntimeOptions
from offload.engine.usage_file import usage_file
from offload.errors import BudgetError, UsageError
from offload.kernels import Kernels, select, select_device
from offload.kernels.device import DeviceKernels
from offload.model.kv_cache import KVCache
from offload.model.place import Place
from offload.model.single_token import SingleToken
from offload.model.transformer import DeepseekV3
from offload.model.weights import PlacedWeights, load_weights
from offload.store import Store
from offload.store.mirror import check_mirror
from offload.tiers.device import Device
from offload.tiers.device_executor import DeviceExecutor, DeviceShare
from offload.tiers.executor import Executor
from offload.tiers.ram import RamTier
from offload.tiers.vram_memory import lent_slots, slot_nbytes
from offload.tune.budget import FREE_SHARE, RamPlan, kv_cache_nbytes, longest_chunk, plan_ram, ram_for_slots
from offload.tune.memory import memory, process_nbytes
from offload.tune.vram_budget import DEVICE_CHUNK, VramPlan, default_limit, device_demand, plan_vram
from offload.types import format_size, parse_size

log = logging.getLogger("expertpager")


@dataclass
class Backend:
    """A model ready to run."""

    kernels: Kernels
    executor: Executor | DeviceExecutor
    model: DeepseekV3
    cache: KVCache
    plan: RamPlan
    vram: list[VramPlan] = field(default_factory=list)
    devices: Sequence[Device] = ()
    warmed: int = 0
    """Experts that were read at the start because a profile says so."""

    def peak_vram(self) -> int:
        """Most memory that this process held on its devices together, in bytes."""
        return sum(device.peak_nbytes() for device in self.devices)

    def describe(self) -> list[str]:
        """One line per budget."""
        return [*(plan.describe() for plan in self.vram), self.plan.describe()]


def load_on_cpu(store: Store, options: RuntimeOptions, context: int, record: bool, share: float = 1.0) -> Backend:
    """Everything in RAM, computed by the processor. `share`: of the experts, where no budget is given."""
    kernels = select(options.kernels, options.threads)  # before the plan: what it takes counts to the process
    plan = make_plan(store, options, _cpu_demand(store, context), share)
    tier = _tier_options(store, options, record)
    executor = Executor(store, kernels, slots=plan.slots, max_tokens=plan.chunk, **tier)
    warmed = _warm(executor.ram, options.warm)
    cache = KVCache(store.config, context)
    model = DeepseekV3(store.config, load_weights(store, store.config), kernels, executor, context)
    return Backend(kernels, executor, model, cache, plan, warmed=warmed)


def load_on_devices(
    store: Store,
    options: RuntimeOptions,
    context: int,
    record: bool,
    devices: Sequence[Device],
    share: float = 1.0,
) -> Backend:
    """Resident weights and the KV cache on `devices`, experts in their slots above those of RAM. `share`: of the
    experts, in each of the two, where no budget is given."""
    processor = select(options.kernels, options.threads)
    kernels = select_device(device_kernels(options.kernels))
    kernels.check_experts(store.layout)  # before anything is read or allocated
    config = store.config
    # The embedding stays in RAM; caches and activations of any length do not lie there.
    ram_demand = _cpu_demand(store, 1) | {"resident": _embedding_nbytes(store)}
    chunk = min(DEVICE_CHUNK, longest_chunk(context, options.prefill_chunk))
    plan = replace(make_plan(store, options, ram_demand, share), chunk=chunk)
    vram_plans = _plan_devices(store, options, kernels, context, chunk, devices, share)
    places = [
        Place(device.torch_device, device.guard, device.record, device.call, device.sender)
        for device, vram in zip(devices, vram_plans, strict=True)
        for _ in vram.layers
    ]
    for device, vram in zip(devices, vram_plans, strict=True):
        device.limit(vram.total - vram.driver)
    weights = load_weights(PlacedWeights(store, places), config)
    cache = KVCache(config, context, [place.device for place in places], kernels.latent_dtype)
    executor = DeviceExecutor(
        store,
        _shares(store, kernels, devices, vram_plans),
        slots=plan.slots,
        max_tokens=chunk,
        below=processor if options.split == "hybrid" else None,
        **_tier_options(store, options, record),
    )
    model = DeepseekV3(config, weights, kernels, executor, context, places)
    model.rehearse(sorted({min(tokens, chunk) for tokens in kernels.pass_lengths}), cache, executor.rehearsal())
    for device in devices:
        with device.guard():
            device.synchronize()
    warmed = _warm(executor, options.warm)
    executor.preload()
    model.single = SingleToken(model, executor, kernels, cache)
    return Backend(kernels, executor, model, cache, plan, vram_plans, devices, warmed)


def _warm(tier: RamTier | DeviceExecutor, routing: str | Path | None) -> int:
    """Let `tier` learn from the recorded `routing`; returns how many experts were read at the start."""
    if routing is None:
        return 0
    trace = Trace.load(routing)
    try:
        return tier.warm(trace)
    except UsageError as fault:
        raise UsageError(f"{routing}: {fault}") from None


def make_plan(store: Store, options: RuntimeOptions, demand: dict[str, int], share: float = 1.0) -> RamPlan:
    """The RAM budget: the one given, or what is free, up to the whole model or this share of its experts."""
    process, here = demand["process"], memory()
    free = process + int(here.available * FREE_SHARE)
    if options.ram is not None:
        limit = parse_size(options.ram)
    else:
        enough = _slots_of_share(store, share)
        limit = min(free, ram_for_slots(store.config, enough, prefill_chunk=options.prefill_chunk, **demand))
    plan = plan_ram(
        store.config, limit=limit, allow_slow=options.allow_slow, prefill_chunk=options.prefill_chunk, **demand
    )
    if plan.total > here.total:
        owner = "its control group allows" if here.limited_by_group else "this machine has"
        raise BudgetError(
            f"--ram {format_size(limit)}: {format_size(plan.total)} would be used, and {owner} "
            f"{format_size(here.total)}; give --ram {min(here.total, free) // 2**20}MiB or less"
        )
    if plan.total - process > here.available:
        log.warning(
            "--ram: %s more will be used, and only %s are free; expect swapping",
            format_size(plan.total - process),
            format_size(here.available),
        )
    return plan


def ram_for_share(store: Store, share: float, context: int) -> int:
    """The RAM budget with which `share` (0..1) of the routed experts of `store` have a slot."""
    return ram_for_slots(store.config, _slots_of_share(store, share), **_cpu_demand(store, context))


def _slots_of_share(store: Store, share: float) -> int:
    return round(share * store.config.n_routed_experts * len(store.config.moe_layers))


def _cpu_demand(store: Store, context: int) -> dict[str, int]:
    """What a plan needs to know of the machine and the store, in bytes and tokens."""
    return {
        "process": process_nbytes(),
        "resident": store.resident_nbytes,
        "slot_nbytes": store.layout.slot_nbytes,
        "context": context,
    }


def _tier_options(store: Store, options: RuntimeOptions, record: bool) -> dict[str, Any]:
    return {
        "policy": options.policy,
        "half_life": options.half_life,
        "allow_slow": options.allow_slow,
        "record": record,
        "prefer_resident": options.prefer_resident,
        "mirror": check_mirror(store, options.mirror) if options.mirror is not None else None,
        "prefetch": options.prefetch,
        "prefetch_depth": options.prefetch_depth,
        "readers": options.readers,
        "usage": usage_file(store.path, options.usage),
    }


def _embedding_nbytes(store: Store) -> int:
    return sum(n for name, n in store.resident_sizes.items() if name.startswith("model.embed_tokens."))


def _layer_nbytes(store: Store) -> list[int]:
    """Resident bytes of each decoder layer; head and final norm count to the last one."""
    config = store.config
    sizes = [0] * config.num_hidden_layers
    for name, nbytes in store.resident_sizes.items():
        parts = name.split(".")
        if parts[1] == "layers":
            sizes[int(parts[2])] += nbytes
        elif parts[1] != "embed_tokens":
            sizes[-1] += nbytes
    return sizes


def _plan_devices(
    store: Store,
    options: RuntimeOptions,
    kernels: DeviceKernels,
    context: int,
    chunk: int,
    devices: Sequence[Device],
    share: float,
) -> list[VramPlan]:
    config = store.config
    limits = [
        default_limit(device.memory().free, device.driver_nbytes) if options.vram is None else parse_size(options.vram)
        for device in devices
    ]
    sizes = _layer_nbytes(store)
    kv = kv_cache_nbytes(config, context, kernels.latent_dtype.itemsize, range(1))
    names = [device.name for device in devices]
    owned = dispatch_layers([size + kv for size in sizes], limits, names)
    blas = [device.blas_nbytes if kernels.uses_blas else 0 for device in devices]
    return [
        plan_vram(
            config,
            device_demand(
                config,
                layers,
                resident=sum(sizes[layer] for layer in layers),
                context=context,
                chunk=chunk,
                scratch=kernels.scratch_nbytes,
                latent_itemsize=kernels.latent_dtype.itemsize,
                libraries=libraries,
            ),
            name=device.name,
            limit=limit,
            slot_nbytes=slot_nbytes(store.layout),
            lendable=lent_slots(store.layout, chunk, config.num_experts_per_tok),
            share=share if options.vram is None else 1.0,
            driver=device.driver_nbytes,
            rounding=device.rounding_nbytes,
        )
        for device, limit, layers, libraries in zip(devices, limits, owned, blas, strict=True)
    ]


def _shares(
    store: Store, kernels: DeviceKernels, devices: Sequence[Device], plans: Sequence[VramPlan]
) -> list[DeviceShare]:
    moe = store.config.moe_layers
    shares = []
    for device, plan in zip(devices, plans, strict=True):
        layers = range(max(plan.layers.start, moe.start), plan.layers.stop)
        if layers:  # a device may have dense layers only
            shares.append(DeviceShare(device, kernels, layers, plan.slots, plan.lent > 0))
    return shares
