"""Runs on a GPU beside the cost model: what was expected, what was counted.

Owns taking phases of runs apart into what `gpu_cost` predicts. The causes of a gap are `compare`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from offload.engine.summary import Phase
from offload.tune.budget import RamPlan
from offload.tune.compare import Comparison, Measured, compare_gpu
from offload.tune.cost import ModelCost, distinct_experts
from offload.tune.gpu_cost import GpuDemand, gpu_decode_cost, gpu_prefill_cost
from offload.tune.hits import HitCurve
from offload.tune.layer_clock import Demand
from offload.tune.machine import MachineSpec
from offload.tune.plan_gpu import prompt_share
from offload.tune.vram_budget import VramPlan


@dataclass(frozen=True)
class GpuRun:
    """How the model was loaded, and the hit rates that are expected of it."""

    vram: Sequence[VramPlan]
    ram: RamPlan
    hybrid: bool
    curve: HitCurve

    @property
    def slots(self) -> int:
        """Expert slots of all devices."""
        return sum(plan.slots for plan in self.vram)

    @property
    def share(self) -> float:
        """Share of the experts, 0..1, that have one of them."""
        return self.slots / sum(plan.experts for plan in self.vram)

    @property
    def ram_share(self) -> float:
        return self.ram.slots / self.ram.experts

    @property
    def demand(self) -> GpuDemand:
        """What becomes of the demands of decoding, as expected."""
        return GpuDemand.expected(self.curve, self.share, self.ram_share)

    def compare_decode(
        self, what: str, model: ModelCost, machine: MachineSpec, phases: Sequence[Phase], context: int
    ) -> Comparison:
        """Decoding at about position `context`, per token: medians of `phases`."""
        expected = self.demand
        counted = _mean([phase.gpu_demand(expected.below.prefetch_depth, expected.paged) for phase in phases])
        assumed, actual = (
            gpu_decode_cost(model, machine, demand, context, hybrid=self.hybrid) for demand in (expected, counted)
        )
        return compare_gpu(what, _measured(phases, per_token=True), assumed, actual, _link(machine, phases))

    def compare_prompt(
        self, what: str, model: ModelCost, machine: MachineSpec, phases: Sequence[Phase], *, cold: bool
    ) -> Comparison:
        """A whole prompt; `cold`: no expert was resident when it began, unless all of them are from the start."""
        tokens, alike = phases[0].tokens, self.curve.alike
        vram = prompt_share(self.vram)
        both = max(vram, self.ram_share)
        if cold and vram < 1:
            vram = both = 0.0
        used = distinct_experts(model.config, min(tokens, self.ram.chunk), alike) * len(model.config.moe_layers)
        used *= -(-tokens // self.ram.chunk) * model.expert_nbytes
        copied = median(phase.vram.bytes_read if phase.vram else 0 for phase in phases)
        read = median(phase.bytes_read for phase in phases)
        # More bytes than a sweep: the prompt used more experts than foretold, or some were copied for nothing.
        counted = max(0.0, 1 - copied / used), max(0.0, 1 - read / used)
        assumed, actual = (
            gpu_prefill_cost(model, machine, tokens, self.ram.chunk, here, anywhere, alike)
            for here, anywhere in ((vram, both), counted)
        )
        return compare_gpu(what, _measured(phases, per_token=False), assumed, actual, _link(machine, phases))


def _measured(phases: Sequence[Phase], per_token: bool) -> Measured:
    of = [(phase, phase.tokens if per_token else 1) for phase in phases]
    return Measured(
        median(phase.seconds / tokens for phase, tokens in of),
        median(phase.stall_s / tokens for phase, tokens in of),
        median(phase.bytes_read / tokens for phase, tokens in of),
    )


def _link(machine: MachineSpec, phases: Sequence[Phase]) -> float:
    """Seconds of the copies over those that the link's figure gives; 1 where nothing was copied."""
    assert machine.gpu is not None
    rates = [phase.vram.bandwidth for phase in phases if phase.vram and phase.vram.bandwidth]
    return machine.gpu.h2d / median(rates) if rates else 1.0


def _mean(found: Sequence[GpuDemand]) -> GpuDemand:
    """The means of runs' demands."""
    first = found[0]
    below = [demand.below for demand in found]
    hit, ahead, wasted = (fmean(getattr(demand, name) for demand in below) for name in ("hit", "ahead", "wasted"))
    mean = Demand(hit, ahead, wasted, first.below.prefetch_depth)
    return replace(first, vram=fmean(demand.vram for demand in found), below=mean)
