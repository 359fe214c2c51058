"""What a token costs where a GPU computes: seconds of the device, the link, the drive and the host.

Owns the arithmetic. Pure: no files, no clocks, no measuring. Recorded steps with planted hits (an H200 and an H100,
benchmarks/results/gpu.jsonl) are, within a few percent, the step with every expert in VRAM plus the copies of those
that it lacks, at every share of hits, in decoding as in prompts. So that is what is computed: copies of demanded
experts add to the device's work. What they hide of it (kernels of the hits) they cost elsewhere (the way of the ids,
kernels of few rows).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import comb, inf

from offload.cache.split import Rates, SplitModel
from offload.tune.attention_shapes import AttentionShapes
from offload.tune.cost import ModelCost, attention_flops, distinct_experts
from offload.tune.hits import HitCurve
from offload.tune.layer_clock import Demand, arrival_times
from offload.tune.machine import FormatRate, MachineSpec

PASS_NBYTES = 700
"""Bytes of activations that pass through device memory in a layer of a prompt, per token and element of the hidden
state: what recorded prompts took more where they were longer, the router's choice included."""


@dataclass(frozen=True)
class GpuDemand:
    """What becomes of the demands of decoding, each as a share of them."""

    vram: float
    """Find their expert in VRAM."""
    below: Demand
    """Of all demands, not of what VRAM lacks: `hit` counts RAM and VRAM together."""
    paged: bool = True
    """Whether any expert lacks a slot in VRAM, so that the host decides."""

    @classmethod
    def expected(cls, curve: HitCurve, vram_share: float, ram_share: float) -> GpuDemand:
        """With slots for these shares (0..1) of the experts.

        RAM keeps what it has passed on, and both tiers rank experts by the same values: the larger one has what the
        smaller one has. What VRAM lacks comes from RAM.
        """
        found = curve.demand(vram_share)
        return cls(found.hit + found.ahead, curve.demand(max(vram_share, ram_share)), vram_share < 1)


@dataclass(frozen=True)
class GpuCost:
    """Seconds of one forward pass by what they are spent on; they add up to `total_s`."""

    device_s: float
    """The device reads weights and multiplies."""
    link_s: float
    """Experts are copied to it."""
    processor_s: float
    """The processor computes experts in RAM (`--split hybrid`) while nothing is copied any more."""
    stall_s: float
    """The drive is waited for, and nothing else is left to do."""
    overhead_s: float
    """Launches, small kernels, decisions and Python."""
    copied_nbytes: float
    """Bytes that cross the link."""
    read_nbytes: float
    """Bytes the drive delivers."""
    tokens: int = 1

    @property
    def total_s(self) -> float:
        return self.device_s + self.link_s + self.processor_s + self.stall_s + self.overhead_s

    @property
    def tok_s(self) -> float:
        return self.tokens / self.total_s

    @property
    def binding(self) -> str:
        """What takes most of the time: `drive`, `link`, `device`, `processor`, `overhead`."""
        parts = {
            "drive": self.stall_s,
            "link": self.link_s,
            "device": self.device_s,
            "processor": self.processor_s,
            "overhead": self.overhead_s,
        }
        return max(parts, key=lambda name: parts[name])


def gpu_decode_cost(
    model: ModelCost, machine: MachineSpec, demand: GpuDemand, context: int = 0, *, hybrid: bool = False
) -> GpuCost:
    """One decoded token at position `context` on the machine's GPU, which it must have.

    `hybrid`: the processor computes a part of what VRAM lacks, as the runtime's own model divides it.
    """
    assert machine.gpu is not None, "there is a cost of a GPU only where there is a GPU"
    gpu, config = machine.gpu, model.config
    every, moe, k = config.num_hidden_layers, len(config.moe_layers), config.num_experts_per_tok
    own, expert = gpu.resident_rate(model.resident), model.expert_nbytes / gpu.expert_rate(model.experts).read
    attention = min(model.attention_nbytes, model.resident_read_nbytes) / own.read
    attention += every * AttentionShapes.of(config).past_flops * context / (gpu.past_gflops * 1e9)
    others = max(0.0, model.resident_read_nbytes - model.attention_nbytes) / own.read
    head = model.head_nbytes / gpu.resident_rate(model.head).read
    before = attention / every + gpu.layer_s
    layer = _missing(model, machine, demand, before, hybrid)
    overhead = every * gpu.layer_s + gpu.token_time(config.vocab_size)
    if demand.paged:
        # The host decides while the device is busy with the layer and the link with copies.
        hidden = before + others / every + k * expert + layer.link_s
        overhead += gpu.decide_token_s + moe * max(0.0, gpu.decide_s - hidden)
    return GpuCost(
        device_s=attention + others + head + moe * k * expert,  # what the processor computes costs as much in waits
        link_s=moe * layer.link_s,
        processor_s=moe * layer.processor_s,
        stall_s=moe * layer.stall_s,
        overhead_s=overhead,
        copied_nbytes=moe * layer.copied * model.expert_nbytes,
        read_nbytes=moe * k * demand.below.reads * model.expert_nbytes,
    )


@dataclass
class _Missing:
    """What a layer spends on experts that VRAM lacks, expected values."""

    link_s: float = 0.0
    processor_s: float = 0.0
    stall_s: float = 0.0
    copied: float = 0.0


def _missing(model: ModelCost, machine: MachineSpec, demand: GpuDemand, before: float, hybrid: bool) -> _Missing:
    """One MoE layer; `before`: seconds of the device between a router applied early and the layer's own.

    The number of demands that VRAM lacks is taken as binomial, so is that of the reads among them, and of those whose
    read has begun before. Experts of RAM are copied at once, the others as they are read.
    """
    gpu, k, size = machine.gpu, model.config.num_experts_per_tok, model.expert_nbytes
    assert gpu is not None
    below, absent_share = demand.below, min(1.0, max(0.0, 1 - demand.vram))
    read_share = min(1.0, (1 - below.hit) / absent_share) if absent_share else 0.0
    split = _split(model, machine)
    found = _Missing()
    for absent, chance in _binomial(k, absent_share):
        in_place = split.divide(k - absent, absent).in_place if hybrid else 0
        link = (absent - in_place) * size / split.rates.link
        busy = max(link, in_place * size / split.rates.cpu, absent * size / split.rates.memory if in_place else 0.0)
        found.link_s += chance * link
        found.processor_s += chance * (busy - link)
        found.copied += chance * (absent - in_place)
        for reads, likely in _binomial(absent, read_share):
            for early, foretold in _binomial(reads, below.foretold):
                begun = [max(0.0, time - before) for time in arrival_times(machine, early, size)]
                free = begun[-1] if begun else 0.0
                times = [*begun, *(free + time for time in arrival_times(machine, reads - early, size))]
                now = (absent - reads) * busy / absent if absent else 0.0
                for time in times:
                    now = max(now, time) + busy / absent
                found.stall_s += chance * likely * foretold * max(0.0, now - busy)
    return found


def _split(model: ModelCost, machine: MachineSpec) -> SplitModel:
    """What the runtime would have learned in service."""
    gpu = machine.gpu
    assert gpu is not None
    cpu = machine.format_rate(model.experts).read
    rates = Rates(
        link=gpu.h2d,
        memory=machine.ram_read,
        cpu=min(cpu, gpu.ram_with_copies or cpu),
        kernel=gpu.expert_rate(model.experts).read,
    )
    return SplitModel(model.expert_nbytes, rates)


def _binomial(count: int, share: float) -> Iterator[tuple[int, float]]:
    """(number, its chance) of `count` that each happen with `share`, 0..1; without those that cannot be."""
    for found in range(count + 1):
        chance = comb(count, found) * share**found * (1 - share) ** (count - found)
        if chance > 0:
            yield found, chance


def pass_seconds(rate: FormatRate, nbytes: float, parameters: float, rows: float) -> float:
    """Seconds of products of `parameters` weights (`nbytes` of them) with `rows` rows: reading them, or multiplying."""
    return max(nbytes / rate.read, 2.0 * rows * parameters / (rate.gflops * 1e9))


def gpu_chunk_cost(
    model: ModelCost, machine: MachineSpec, tokens: int, start: int, vram: float, both: float, alike: float = inf
) -> GpuCost:
    """One chunk of a prompt of `tokens` tokens after `start` others, when shares `vram` of the experts are in VRAM and
    `both` in VRAM or RAM. `alike`: see `distinct_experts`.
    """
    gpu, config = machine.gpu, model.config
    assert gpu is not None
    every, moe, size = config.num_hidden_layers, len(config.moe_layers), model.expert_nbytes
    used = distinct_experts(config, tokens, alike)
    copied, read = used * (1 - vram), used * (1 - max(vram, both))
    rate, own = gpu.expert_rate(model.experts), gpu.resident_rate(model.resident)
    rows = tokens * config.num_experts_per_tok / used
    experts = used * pass_seconds(rate, size, config.expert_parameters, rows)
    device = pass_seconds(own, model.resident_read_nbytes, model.resident_parameters, tokens)
    device += every * attention_flops(config, tokens, start) / (gpu.past_gflops * 1e9)
    device += every * tokens * config.hidden_size * PASS_NBYTES / gpu.read
    # Attention is over before a layer asks; its experts are computed and copied while others are read.
    reading = read * size / machine.drive_read + machine.first_read_s if read >= 1 else 0.0
    link = copied * size / gpu.h2d
    return GpuCost(
        device_s=device + moe * experts,
        link_s=moe * link,
        processor_s=0.0,
        stall_s=moe * max(0.0, reading - link - experts),
        overhead_s=every * gpu.prompt_layer_s,
        copied_nbytes=moe * copied * size,
        read_nbytes=moe * read * size,
        tokens=tokens,
    )


def gpu_prefill_cost(
    model: ModelCost, machine: MachineSpec, prompt: int, chunk: int, vram: float, both: float, alike: float = inf
) -> GpuCost:
    """A whole prompt in chunks of `chunk` tokens, to the first token after it."""
    gpu = machine.gpu
    assert gpu is not None
    starts = range(0, prompt, chunk)
    parts = [gpu_chunk_cost(model, machine, min(chunk, prompt - at), at, vram, both, alike) for at in starts]
    head = model.head_nbytes / gpu.resident_rate(model.head).read
    return GpuCost(
        sum(part.device_s for part in parts) + head,
        sum(part.link_s for part in parts),
        0.0,
        sum(part.stall_s for part in parts),
        sum(part.overhead_s for part in parts) + gpu.token_time(model.config.vocab_size),
        sum(part.copied_nbytes for part in parts),
        sum(part.read_nbytes for part in parts),
        prompt,
    )
