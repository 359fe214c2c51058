"""A benchmark as a page: speed of every run, where a token's time goes, waiting per layer, prediction beside it.

Owns how `BenchReport` is drawn. Computes nothing but medians.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from offload.engine.summary import Phase
from offload.report import Curve, Page, line_chart, stacked_bars
from offload.tune.compare import Comparison
from offload.types import format_size

if TYPE_CHECKING:
    from offload.engine.bench import BenchReport, Sample


def bench_page(report: BenchReport) -> Page:
    """The page of `expertpager bench --html`."""
    decode = [sample.decode for sample in report.warm]
    page = Page(f"Benchmark of {report.store}", report.described[0] if report.described else "")
    page.fact("warm decode, median", f"{median(phase.tok_s for phase in decode):.2f} tok/s")
    page.fact("warm hit rate", f"{median(phase.hit_rate for phase in decode):.1%}")
    page.fact("cold first token", f"{median(s.prefill.seconds for s in report.cold):.2f} s")
    page.fact("peak RAM", format_size(report.peak_ram_bytes))
    page.fact("expert slots", f"{report.slots} ({report.share:.0%})")
    if report.gpu:
        page.fact("in VRAM", f"{report.gpu.slots} ({report.gpu.share:.0%})")
    page.section("Setting", *report.described, *report.notes)
    page.section(
        "Where the time of a token goes", "Medians per token. Waiting is time in which nothing was left to compute."
    ).chart(_time_chart(report))
    if any(report.layer_stall_s):
        page.section("Waiting per layer", "Warm decoding, per token.").chart(_layer_chart(report.layer_stall_s))
    if report.comparisons:
        section = page.section("Beside the plan", *(item.line() for item in report.comparisons))
        section.chart(_comparison_chart(report.comparisons))
    page.section("Every run").table(
        ["run", "tokens", "tok/s", "hits", "read per token", "waiting", "drive", *(_ON_GPU if report.gpu else ())],
        [*_rows("cold", report.cold), *_rows("warm", report.warm)],
    )
    return page


def _time_chart(report: BenchReport) -> str:
    rows = {}
    for kind, samples in (("cold", report.cold), ("warm", report.warm)):
        for part in ("prefill", "decode"):
            phases: list[Phase] = [getattr(sample, part) for sample in samples]
            waiting = 1000 * median(phase.stall_s / phase.tokens for phase in phases)
            whole = 1000 * median(phase.seconds / phase.tokens for phase in phases)
            rows[f"{kind} {part}"] = {"computing": max(0.0, whole - waiting), "waiting for the drive": waiting}
    return stacked_bars(rows, x_label="milliseconds per token")


def _layer_chart(layer_stall_s: Sequence[float]) -> str:
    layers = [float(layer) for layer in range(len(layer_stall_s))]
    curve = Curve("waiting", layers, [1000 * seconds for seconds in layer_stall_s])
    return line_chart([curve], x_label="MoE layer", y_label="ms per token")


def _comparison_chart(comparisons: Sequence[Comparison]) -> str:
    """Only ratios: decode and prefill differ too much in size for one axis of seconds."""
    rows = {item.what: {"measured / predicted time": item.measured_s / item.predicted_s} for item in comparisons}
    return stacked_bars(rows, x_label="measured / predicted time (1 is exact)")


_ON_GPU = ("VRAM hits", "copied per token", "link")


def _on_gpu(phase: Phase) -> list[str]:
    if phase.vram is None:
        return []
    rate = f"{phase.vram.bandwidth / 1e9:.2f} GB/s" if phase.vram.read_s else ""
    return [f"{phase.vram.hit_rate:.1%}", format_size(phase.vram.bytes_read / phase.tokens), rate]


def _rows(kind: str, samples: Sequence[Sample]) -> list[list[str]]:
    rows = []
    for number, sample in enumerate(samples, 1):
        for part, phase in (("prefill", sample.prefill), ("decode", sample.decode)):
            rate = f"{phase.bandwidth / 1e9:.2f} GB/s" if phase.read_s else ""
            rows.append(
                [
                    f"{kind} {number}, {part}",
                    str(phase.tokens),
                    f"{phase.tok_s:.2f}",
                    f"{phase.hit_rate:.1%}",
                    format_size(phase.bytes_read / phase.tokens),
                    f"{phase.stall_s / phase.seconds:.0%}",
                    rate,
                    *_on_gpu(phase),
                ]
            )
    return rows
