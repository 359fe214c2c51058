"""Measuring this machine: drive, RAM, kernels, overhead; the result is a machine file.

Owns the measurements and their order. Must not predict. Everything is measured through the parts that a run uses:
the drive through `DiskReader` with direct I/O, the processor through the kernels API, the overhead of a layer through
the decoder and the executor with weights too small to matter.

A processor's speed changes within seconds: other work shares its memory, its clock, or the cores themselves. So
everything is measured in several passes over all of it, and what counts is the mean of the times, in which a run meets
slow moments and fast ones as well. A figure for which a pass took twice as long as usual leaves that out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from offload.cache.policy import LEARNING
from offload.errors import UsageError
from offload.kernels import FusedKernels, Kernels, select
from offload.kernels.device import DeviceKernels
from offload.kernels.native import NativeKernels, usable_cpus
from offload.kernels.native_library import available
from offload.quant import get_codec
from offload.store import Store
from offload.store.layout import ExpertLayout
from offload.store.manifest import MANIFEST_NAME
from offload.tiers.device import Device
from offload.tiers.disk import READERS
from offload.tiers.host import SlotPool
from offload.tune.arena import SWEPT, Arena
from offload.tune.attention_shapes import DEEPSEEK_V3, AttentionShapes
from offload.tune.machine import ROWS, Gpu, MachineSpec, mean
from offload.tune.machine_file import save_machine
from offload.tune.overhead import OverheadModels
from offload.tune.probe_attention import block_nbytes, measure_attention, measure_past, random_layer
from offload.tune.probe_drive import extents_at, measure_drive, measure_together, slots_for
from offload.tune.probe_experts import expert_wave, measure_format, measure_least, random_expert, random_experts
from offload.tune.probe_gpu import measure_gpu
from offload.tune.probe_report import ProbeReport
from offload.tune.small_model import V3_ROUTING, routing_of
from offload.tune.surroundings import OtherWork, warnings
from offload.tune.timing import mean_time
from offload.types import Extent, align_up

FORMATS = ("int4-g32", "int4-g128", "int8-g128", "nf4-b64", "int3-g32", "int2-g32", "fp8", "bf16")
RESIDENT_FORMATS = ("int4-g32", "int4-g128", "int8-g128", "fp8", "bf16")

GPU_FORMATS = ("int4-g32", "int8-g128", "fp8")
GPU_RESIDENT_FORMATS = ("int8-g128", "fp8", "bf16")
"""Those of most recipes: every further one takes a compiler seconds."""

V3_VOCABULARY = 129280

LAYER_NBYTES = 32 << 20
"""Bytes of weights that pass through the caches between the decisions of two layers of a large model, at the least."""

PLAIN = "lru"
"""Stands for the policies that learn nothing from tokens."""


@dataclass(frozen=True)
class Effort:
    """How long and how large: the defaults take about a minute."""

    seconds: float = 0.8
    """Per measured figure, in all passes together."""
    passes: int = 5
    file_nbytes: int = 1 << 30
    hidden_size: int = 7168
    moe_intermediate_size: int = 2048
    attention: AttentionShapes = DEEPSEEK_V3
    routing: Mapping[str, int] = field(default_factory=lambda: dict(V3_ROUTING))
    """By names in config.json."""
    layer_nbytes: int = LAYER_NBYTES
    """Weights of a layer that a token uses, so many bytes of them at most."""
    buffer_nbytes: int = SWEPT
    """Memory that is swept."""
    formats: tuple[str, ...] = FORMATS
    """Of experts and of whatever else is one matrix at a time."""
    resident_formats: tuple[str, ...] = RESIDENT_FORMATS
    """Of blocks of attention; each must be among `formats`."""
    gpu_formats: tuple[str, ...] = GPU_FORMATS
    """Of experts on a GPU."""
    gpu_resident_formats: tuple[str, ...] = GPU_RESIDENT_FORMATS
    """Of blocks of attention there."""

    def layout(self, codec: str) -> ExpertLayout:
        """Of its experts in `codec`."""
        return ExpertLayout(get_codec(codec), self.hidden_size, self.moe_intermediate_size)

    @property
    def arena_nbytes(self) -> int:
        """Memory for all that is measured: at least two experts or blocks of attention of every format."""
        experts = [2 * align_up(self.layout(codec).stride) for codec in ("int4-g32", *self.formats)]
        blocks = [2 * block_nbytes(codec, self.attention) for codec in self.resident_formats]
        return max(self.buffer_nbytes, *experts, *blocks)


Tell = Callable[[str], None]


def probe(
    output: str | Path,
    *,
    location: str | Path = ".",
    threads: int | None = None,
    kernels: str = "auto",
    effort: Effort | None = None,
    tell: Tell | None = None,
    gpu: tuple[Device, DeviceKernels] | None = None,
    sampling: Callable[[int], Callable[[], object]] | None = None,
) -> ProbeReport:
    """Measure this machine, the drive at `location` (a store, or a folder that may be written), and write `output`.
    `gpu`: a device to measure as well, and its kernels. `sampling(vocab_size)` is what draws a token from as many
    logits: it counts to what a token takes there.

    Raises UsageError when there is no such folder, BudgetError when it has no room for a test file.
    """
    folder, target = Path(location), Path(output)
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; give the store's or the one it will be made in")
    store = Store.open(folder) if (folder / MANIFEST_NAME).exists() else None
    effort, tell = effort or effort_for(store), tell or _silent
    if not target.absolute().parent.is_dir():
        raise UsageError(f"--output {target}: there is no folder {target.absolute().parent}")
    others = OtherWork()
    backend = select(kernels, threads)
    draw = sampling(store.config.vocab_size if store else V3_VOCABULARY) if sampling else None
    part = replace(effort, seconds=effort.seconds / effort.passes)
    with ExitStack() as stack:
        extents = stack.enter_context(extents_at(folder, store, effort.file_nbytes, effort.layout("int4-g32")))
        models = [stack.enter_context(OverheadModels(backend, each, effort.routing)) for each in (LEARNING, PLAIN)]
        drive = _Drive(extents, slots_for(extents), psutil.disk_usage(str(folder)).free)
        steps = [_numbered(tell, number + 1, effort.passes) for number in range(effort.passes)]
        arena = Arena(effort.arena_nbytes)
        passes = [_measured(backend, threads or usable_cpus(), drive, arena, models, part, draw, s) for s in steps]
    machine = mean(passes)
    if gpu is not None:
        tell(gpu[0].name)
        measured = _measure_gpu(*gpu, machine.threads, effort)
        if draw is not None:
            measured = replace(measured, token_s=(measured.token_s or 0.0) + mean_time(draw, part.seconds))
        machine = replace(machine, gpu=measured)
    warned = warnings(
        folder,
        kernels=backend.name,
        drive_read=machine.drive_read,
        buffered=drive.buffered,
        others=others.cores(),
        paces={
            "the processor's speed": [one.formats["int4-g32"].read for one in passes],
            "the drive's speed": [one.drive_read for one in passes],
        },
    )
    machine = replace(machine, warnings=warned)
    save_machine(machine, target)
    return ProbeReport(machine, target, backend.name)


@dataclass
class _Drive:
    """Where to read from, and into what."""

    extents: Sequence[Extent]
    pool: SlotPool
    free: int
    buffered: bool = False
    """Whether direct I/O was refused."""


def _measured(
    kernels: Kernels,
    threads: int,
    drive: _Drive,
    arena: Arena,
    models: Sequence[OverheadModels],
    effort: Effort,
    draw: Callable[[], object] | None,
    tell: Tell,
) -> MachineSpec:
    """One pass over everything but a GPU. `models`: under a policy that learns and one that does not; `draw`: what
    samples a token."""
    tell("drive")
    # A share of each figure's time, so that all depths together take what two figures would.
    measured = measure_drive(drive.extents, drive.pool, effort.seconds / 2)
    drive.buffered = measured.buffered
    tell("drive beside kernels")
    work = expert_wave(kernels, random_experts(effort.layout("int4-g32"), arena), ROWS, 2)
    together = measure_together(drive.extents, drive.pool, work, effort.seconds / 4)
    tell("RAM")
    ram = measure_ram(arena.bytes[: effort.buffer_nbytes], threads, effort.seconds / 2)
    least = measure_least(kernels, effort.seconds / 4)
    formats = {}
    for codec in effort.formats:
        tell(f"kernels, {codec}")
        formats[codec] = measure_format(kernels, effort.layout(codec), least, arena, effort.seconds)
    shapes, part = effort.attention, effort.seconds / 2
    if isinstance(kernels, FusedKernels):
        for codec in effort.resident_formats:
            tell(f"attention, {codec}")
            found = measure_attention(kernels, codec, shapes, arena, part, least.attention)
            formats[codec] = replace(formats[codec], attention=found)
    past = measure_past(kernels, shapes, arena, part)
    tell("overhead")
    weights = arena.bytes[: align_up(min(effort.layer_nbytes, effort.buffer_nbytes), 8)]
    overheads: list[dict[str, Any]] = [
        each.measure(effort.seconds / 2, lambda: read_once(weights, kernels)).times for each in models
    ]
    drawing = mean_time(draw, effort.seconds / 4) if draw else 0.0
    for times in overheads:
        times["token_s"] += drawing
        # The small model's reads are small. In a prompt the drive's share of the processor is in `kernels_beside`.
        times["miss_s"] += measured.processor_s
    memory = psutil.virtual_memory()
    learning, plain = overheads
    return MachineSpec(
        name=f"this machine, {_processor()}",
        ram_total=memory.total,
        ram_available=memory.available,
        ram_read=max(ram.values()),
        ram_threads=ram,
        drive_read=measured.rates[str(READERS)],
        drive_latency_s=measured.latency_s,
        drive_free=max(1, drive.free),
        depths=measured.rates,
        drive_beside=together.drive,
        threads=threads,
        gflops=formats["int4-g32"].gflops,
        attention_gflops=past,
        formats=formats,
        kernels_beside=together.kernels,
        plain=plain,
        **learning,
    )


def effort_for(store: Store | None) -> Effort:
    """Matrices of the store's own sizes: small ones are slower per byte. DeepSeek-V3's where there is no store yet."""
    if store is None:
        return Effort()
    config = store.config
    return Effort(
        hidden_size=config.hidden_size,
        moe_intermediate_size=config.moe_intermediate_size,
        attention=AttentionShapes.of(config),
        routing=routing_of(config),
        layer_nbytes=min(LAYER_NBYTES, _layer_nbytes(store)),
        gpu_formats=(store.manifest.recipe["experts"],),
        gpu_resident_formats=tuple(dict.fromkeys((store.manifest.recipe["resident"], store.codec_name("lm_head")))),
    )


def _layer_nbytes(store: Store) -> int:
    """Bytes of weights that a token uses in a layer of the store, about."""
    config, expert = store.config, store.layout.stride
    return config.num_experts_per_tok * expert + store.resident_nbytes // config.num_hidden_layers


def measure_ram(data: torch.Tensor, threads: int, seconds: float) -> dict[str, float]:
    """Bytes per second of reading `data`, by number of threads."""
    counts = sorted({1, 2, 4, 8, 16, 32, 64, threads} & set(range(1, threads + 1)))
    return {str(count): ram_rate(data, count, seconds) for count in counts}


def ram_rate(data: torch.Tensor, threads: int, seconds: float) -> float:
    """Bytes per second of reading `data`, uint8, with `threads` threads."""
    if available() is None:
        kernels = NativeKernels(threads=threads)
        return data.nbytes / mean_time(lambda: kernels.read(data), seconds)
    parts = np.array_split(data.numpy().view(np.int64), threads)
    with ThreadPoolExecutor(threads) as pool:
        return data.nbytes / mean_time(lambda: list(pool.map(np.sum, parts)), seconds)


def read_once(data: torch.Tensor, kernels: Kernels) -> None:
    """Read `data`, uint8, as weights are read."""
    if isinstance(kernels, NativeKernels):
        kernels.read(data)
    else:
        data.view(torch.int64).sum()


def _measure_gpu(device: Device, kernels: DeviceKernels, threads: int, effort: Effort) -> Gpu:
    data = torch.ones(effort.buffer_nbytes, dtype=torch.uint8)
    return measure_gpu(
        device,
        kernels,
        {codec: random_expert(effort.layout(codec), 0) for codec in effort.gpu_formats},
        {codec: random_layer(codec, effort.attention)[1] for codec in effort.gpu_resident_formats},
        effort.attention,
        buffer_nbytes=effort.buffer_nbytes,
        seconds=effort.seconds,
        ram_rate=lambda seconds: ram_rate(data, threads, seconds),
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return "unknown processor"


def _numbered(tell: Tell, number: int, of: int) -> Tell:
    return lambda what: tell(f"{what} ({number} of {of})")


def _silent(_: str) -> None:
    return
