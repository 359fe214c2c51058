"""How fast a store runs here: cold and warm, medians with spread, beside what was predicted.

Owns the order of runs, what is counted and the table. Honest by construction: every run has a prompt of its own (a
repeated one flatters a cache), sampling is not greedy (loops flatter it too), cold runs begin with empty slots, and
experts are read past the page cache.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from offload.engine.bench_page import bench_page
from offload.engine.beside_gpu import GpuRun
from offload.engine.beside_plan import machine_at_hand, model_cost
from offload.engine.engine import Engine
from offload.engine.options import find_profile, resolve_options
from offload.engine.summary import Phase, peak_ram
from offload.errors import UsageError
from offload.report import Page
from offload.tune.compare import Comparison, Measured, compare
from offload.tune.cost import ModelCost, decode_cost, prefill_cost
from offload.tune.layer_clock import Demand
from offload.tune.machine import MachineSpec
from offload.tune.machine_file import load_machine
from offload.tune.planner import hit_curve
from offload.types import format_size

TOPICS = (
    "A ship leaves the harbour at dawn with a cargo of salt, and the harbour master writes down",
    "def merge_sort(values):\n    if len(values) < 2:\n        return values\n    middle =",
    "The second law of thermodynamics says that the entropy of an isolated system",
    "Translate into French: the committee has decided to postpone the meeting until",
    "Ingredients: two onions, a spoon of butter, half a litre of stock. First",
    "SELECT customer, SUM(amount) FROM orders WHERE year = 2024 GROUP BY",
    "In the year of the great frost the river stood still, and merchants",
    "Let G be a finite group of order pq, where p and q are primes with p < q. Then",
)
"""Prompts of different kinds; the router sends each to other experts."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Sample:
    """One generation."""

    prefill: Phase
    decode: Phase
    layer_stall_s: Sequence[float]
    """Waiting per MoE layer while decoding."""


@dataclass(frozen=True)
class BenchReport:
    """All samples of a store under one setting, and the comparison with a machine's figures."""

    store: str
    described: Sequence[str]
    slots: int
    share: float
    context: int
    cold: Sequence[Sample]
    warm: Sequence[Sample]
    notes: Sequence[str]
    machine: MachineSpec | None
    comparisons: Sequence[Comparison]
    peak_ram_bytes: int
    layer_stall_s: Sequence[float] = ()
    """Waiting per MoE layer and token of warm decoding."""
    expected_hit_rate: float | None = None
    """Of decoding, as the prediction assumes; like a run's it counts what was read ahead."""
    chunk: int = 0
    """Prompt tokens that share one sweep of the experts."""
    gpu: GpuRun | None = None
    """How the devices were loaded, where they computed."""

    def page(self) -> Page:
        """For people, with charts."""
        return bench_page(self)

    def lines(self) -> Iterator[str]:
        """A table for people."""
        yield from self.described
        on_gpu = f" {'VRAM hits':>10} {'copied/token':>13} {'link':>11}" if self.gpu else ""
        head = f"{'':<14} {'tok/s':>22} {'read/token':>12} {'hits':>7} {'waiting':>9} {'drive':>11}"
        yield f"{head}     {on_gpu}" if on_gpu else head
        for name, samples in (("cold", self.cold), ("warm", self.warm)):
            for part in ("prefill", "decode"):
                phases = [getattr(sample, part) for sample in samples]
                yield f"{name + ' ' + part:<14} {self._row(phases)}"
        if self.cold or self.warm:
            first = [sample.prefill.seconds for sample in (*self.cold, *self.warm)]
            yield f"first token after {spread(first, 's')} with {(*self.cold, *self.warm)[0].prefill.tokens} tokens"
        for comparison in self.comparisons:
            yield comparison.line()
        if self.machine is not None and not self.comparisons:
            yield "no prediction: the machine file knows no GPU; run `expertpager probe` on the store"
        if self.machine is None:
            yield "no prediction: run `expertpager probe` on the store, or give --machine"
        yield f"peak RAM {format_size(self.peak_ram_bytes)}"
        yield from self.notes

    def _row(self, phases: Sequence[Phase]) -> str:
        rate = median(phase.bandwidth for phase in phases)
        share = f" {rate / self.machine.drive_read:>4.0%}" if self.machine and rate else ""
        return (
            f"{spread([phase.tok_s for phase in phases], ''):>22} "
            f"{format_size(median(phase.bytes_read / phase.tokens for phase in phases)):>12} "
            f"{median(phase.hit_rate for phase in phases):>7.1%} "
            f"{median(phase.stall_s / phase.seconds for phase in phases):>9.0%} "
            f"{rate / 1e9:>6.2f} GB/s{share:<5}{self._on_gpu(phases)}"
        ).rstrip()

    def _on_gpu(self, phases: Sequence[Phase]) -> str:
        """Hits in VRAM, and the link: bytes per token, bytes per second, share of its figure."""
        found = [(phase.vram, phase.tokens) for phase in phases if phase.vram is not None]
        if not found:
            return ""
        rate = median(vram.bandwidth for vram, _ in found)
        figure = self.machine.gpu.h2d if self.machine and self.machine.gpu else 0.0
        share = f" {rate / figure:>4.0%}" if figure and rate else ""
        return (
            f" {median(vram.hit_rate for vram, _ in found):>10.1%} "
            f"{format_size(median(vram.bytes_read / tokens for vram, tokens in found)):>13} "
            f"{rate / 1e9:>6.2f} GB/s{share}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, for machines."""
        return {
            "store": self.store,
            "slots": self.slots,
            "share": self.share,
            "context": self.context,
            "machine": self.machine.name if self.machine else None,
            "cold": [asdict(sample) for sample in self.cold],
            "warm": [asdict(sample) for sample in self.warm],
            "medians": {
                f"{name}_{part}_tok_s": median(getattr(sample, part).tok_s for sample in samples)
                for name, samples in (("cold", self.cold), ("warm", self.warm))
                for part in ("prefill", "decode")
            },
            "compared": {item.what: item.to_dict() for item in self.comparisons},
            "expected_hit_rate": self.expected_hit_rate,
            "vram": None if self.gpu is None else self._vram(),
            "chunk": self.chunk,
            "notes": list(self.notes),
            "peak_ram_bytes": self.peak_ram_bytes,
            "layer_stall_s": list(self.layer_stall_s),
        }

    def _vram(self) -> dict[str, Any]:
        """What the devices had, and what they were expected to hit."""
        assert self.gpu is not None
        counted = [sample.decode.vram for sample in self.warm if sample.decode.vram is not None]
        return {
            "slots": self.gpu.slots,
            "share": self.gpu.share,
            "split": "hybrid" if self.gpu.hybrid else "gpu",
            "expected_hit_rate": self.gpu.demand.vram,
            "warm_decode_hit_rate": median(vram.hit_rate for vram in counted),
            "warm_decode_link": median(vram.bandwidth for vram in counted),
        }


def bench(
    store: str | Path,
    *,
    cold: int = 1,
    warm: int = 3,
    prompt_tokens: int = 64,
    max_tokens: int = 32,
    prompts: str | Path | None = None,
    machine: str | Path | None = None,
    hits: str | None = None,
    drop_caches: bool = False,
    profile: str | Path | None = None,
    tell: Tell | None = None,
    **options: Any,
) -> BenchReport:
    """Generate `cold` times with empty slots and `warm` times with what the runs before left in them.

    `prompts` is a file with one prompt per line. `machine` is a machine file to compare with; without one
    machine.toml of the store or the working folder is taken where it exists. `drop_caches` empties the page cache of
    the whole system before cold runs, which needs the rights of an administrator. `options` are those of
    `offload.load`.
    """
    tell = tell or _silent
    if min(cold, warm) < 1 or max_tokens < 2 or prompt_tokens < 1:
        raise UsageError("a benchmark needs a cold and a warm run, a prompt, and at least 2 tokens to generate")
    # Cold means that nothing is known of earlier runs, and a benchmark teaches nothing to later ones.
    found = find_profile(store, profile)
    resolved = resolve_options(options | {"usage": options.get("usage") or "off"}, found)
    spec = load_machine(machine) if machine else machine_at_hand(Path(store))
    notes: list[str] = []
    samples: dict[str, list[Sample]] = {"cold": [], "warm": []}
    number = 0
    for round_ in range(cold):
        notes += forget_pages(Path(store), drop_caches)
        with Engine(store, resolved, saved_profile=None if profile else found) as engine:
            texts = _prompts(engine, prompts, prompt_tokens)
            for kind in ["cold"] + ["warm"] * (warm if round_ == cold - 1 else 0):
                tell(f"{kind} run {len(samples[kind]) + 1}")
                samples[kind].append(run_once(engine, texts(number), max_tokens, seed=number))
                number += 1
            described, plan, context, vram = engine.describe(), engine.plan, engine.context, engine.vram_plans
            model = model_cost(engine.store)
    share = plan.slots / plan.experts
    compared: list[Comparison] = []
    gpu: GpuRun | None = None
    expected = None
    if spec is not None or vram:
        curve = hit_curve(hits, model.config, resolved.policy, resolved.early_routers, resolved.half_life)
        gpu = GpuRun(vram, plan, resolved.split == "hybrid", curve) if vram else None
        demand = gpu.demand.below if gpu else curve.demand(share)
        expected = demand.hit + demand.ahead if spec else None
        if spec is not None and gpu is None:
            under = spec.under(resolved.policy)
            compared = predictions(model, under, samples["cold"], samples["warm"], demand, plan.chunk, curve.alike)
        elif spec is not None and gpu is not None and spec.gpu is not None:
            compared = gpu_predictions(model, spec, samples["cold"], samples["warm"], gpu)
    return BenchReport(
        str(store),
        described,
        plan.slots,
        share,
        context,
        samples["cold"],
        samples["warm"],
        tuple(dict.fromkeys(notes)),
        spec,
        compared,
        peak_ram(),
        layer_waiting(samples["warm"]),
        expected,
        plan.chunk,
        gpu,
    )


def layer_waiting(samples: Sequence[Sample]) -> list[float]:
    """Seconds of waiting per MoE layer and decoded token, over all samples."""
    tokens = sum(sample.decode.tokens for sample in samples)
    return [sum(layer) / tokens for layer in zip(*(sample.layer_stall_s for sample in samples), strict=True)]


def run_once(engine: Engine, prompt: Sequence[int], max_tokens: int, seed: int) -> Sample:
    """One generation, cut into prefill and decode at its first token."""
    start = engine.snapshot()
    begun = time.perf_counter()
    steps = engine.generate(prompt, max_tokens=max_tokens, temperature=0.8, seed=seed, ignore_eos=True)
    next(steps)
    first, middle = time.perf_counter(), engine.snapshot()
    decoded = sum(1 for _ in steps)
    end, after = time.perf_counter(), engine.snapshot()
    return Sample(
        Phase.between(start, middle, len(prompt), first - begun),
        Phase.between(middle, after, max(1, decoded), end - first),
        [now - then for then, now in zip(middle.layer_stall_s, after.layer_stall_s, strict=True)],
    )


def predictions(
    model: ModelCost,
    machine: MachineSpec,
    cold: Sequence[Sample],
    warm: Sequence[Sample],
    expected: Demand,
    chunk: int,
    alike: float,
    average: Callable[[Iterable[float]], float] = median,
) -> list[Comparison]:
    """Warm decode and cold prefill against the cost model.

    `expected` is what is assumed for decoding, `chunk` the number of tokens that share one sweep of the experts,
    `alike` how alike they are; `average` is taken over runs.
    """
    decode = [sample.decode for sample in warm]
    context = warm[0].prefill.tokens + warm[0].decode.tokens // 2
    per_token = Measured(
        average(phase.seconds / phase.tokens for phase in decode),
        average(phase.stall_s / phase.tokens for phase in decode),
        average(phase.bytes_read / phase.tokens for phase in decode),
    )
    actual = mean_demand([phase.demand(expected.prefetch_depth) for phase in decode])
    learned = warm[0].prefill.tokens / warm[0].decode.tokens
    found = [
        compare(
            "warm decode, per token",
            per_token,
            decode_cost(model, machine, expected, context, learned),
            decode_cost(model, machine, actual, context, learned),
        )
    ]
    prefill = [sample.prefill for sample in cold]
    tokens = prefill[0].tokens
    sweep = prefill_cost(model, machine, tokens, chunk, 0.0, alike)
    read = average(phase.bytes_read for phase in prefill)
    # Fewer bytes than a sweep: the prompt used fewer experts than foretold.
    swept = prefill_cost(model, machine, tokens, chunk, max(0.0, 1 - read / sweep.read_nbytes), alike)
    whole = Measured(average(p.seconds for p in prefill), average(p.stall_s for p in prefill), read)
    return [*found, compare(f"cold prefill of {tokens} tokens", whole, sweep, swept)]


def gpu_predictions(
    model: ModelCost, machine: MachineSpec, cold: Sequence[Sample], warm: Sequence[Sample], run: GpuRun
) -> list[Comparison]:
    """The same against the cost model of a GPU."""
    context = warm[0].prefill.tokens + warm[0].decode.tokens // 2
    prefill = [sample.prefill for sample in cold]
    what = f"cold prefill of {prefill[0].tokens} tokens"
    return [
        run.compare_decode("warm decode, per token", model, machine, [sample.decode for sample in warm], context),
        run.compare_prompt(what, model, machine, prefill, cold=True),
    ]


def mean_demand(found: Sequence[Demand]) -> Demand:
    """The means of runs' demands."""
    sums = {name: sum(getattr(demand, name) for demand in found) for name in ("hit", "ahead", "wasted")}
    return replace(found[0], **{name: total / len(found) for name, total in sums.items()})


def spread(values: Sequence[float], unit: str) -> str:
    """The median with the smallest and largest value."""
    text = f"{median(values):.2f}"
    if len(values) > 1:
        text += f" ({min(values):.2f}-{max(values):.2f})"
    return f"{text} {unit}".rstrip()


def forget_pages(store: Path, everything: bool) -> list[str]:
    """Empty the page cache: of the store's files, or of the whole system. Returns what could not be done."""
    if everything:
        try:
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("3\n", encoding="utf-8")
        except OSError as fault:
            return [f"note: the page cache was not dropped ({fault.strerror}); experts are read past it anyway"]
        return []
    if hasattr(os, "posix_fadvise"):
        for path in store.glob("*.safetensors"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return []


def _prompts(engine: Engine, file: str | Path | None, tokens: int) -> Callable[[int], list[int]]:
    """The prompt of run n, of exactly `tokens` tokens."""
    if file is not None:
        try:
            texts = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as fault:
            raise UsageError(f"--prompts {file} cannot be read: {fault}") from None
        if not texts:
            raise UsageError(f"--prompts {file}: no prompts; write one per line")
    else:
        texts = list(TOPICS)
    if engine.tokenizer is None:
        if file is not None:
            raise UsageError(f"--prompts {file}: the store has no tokenizer to read them with")
        return lambda n: random.Random(n).choices(range(engine.vocab_size), k=tokens)
    encoded = [engine.encode(text) for text in texts]
    # Repeats of a short prompt are shifted by the run's number, so that no two runs are alike.
    return lambda n: ((encoded[n % len(encoded)] + encoded[(n + 1 + n // len(encoded)) % len(encoded)]) * tokens)[
        :tokens
    ]


def _silent(_: str) -> None:
    return
