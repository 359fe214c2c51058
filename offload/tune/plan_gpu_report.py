"""The GPU's part of a plan: lines for people, bars for the page.

Owns how the forecast for a GPU is told. The answers are `plan_gpu`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from offload.report import Page, stacked_bars
from offload.tune.cost import ModelCost, ceiling_tok_s
from offload.tune.machine import Gpu
from offload.tune.plan_gpu import GpuForecast
from offload.tune.setting import Setting
from offload.types import format_size, format_time


def gpu_lines(forecast: GpuForecast, model: ModelCost, gpu: Gpu) -> Iterator[str]:
    """With --device cuda: what it holds, how fast it is, what binds, what would help."""
    if forecast.vram is None or forecast.ram is None or forecast.decode is None or forecast.prefill is None:
        yield f"with --device cuda on {forecast.name} it does not run: {forecast.problem}"
        return
    decode, prefill = forecast.decode, forecast.prefill
    split = "" if forecast.split == Setting.split else f" --split {forecast.split}"
    yield f"with --device cuda{split}, a forecast from {forecast.rests_on}:"
    yield f"  {forecast.vram.describe()}"
    yield f"  {forecast.ram.describe()}"
    yield (
        f"  decode: {decode.tok_s:.2f} tok/s, bound by {decode.binding}; hits {forecast.vram_hit:.0%} VRAM, "
        f"{forecast.hit:.0%} with RAM; per token {_parts(forecast)}"
    )
    alone = f"link alone {ceiling_tok_s(model.token_nbytes, gpu.h2d):.2f} tok/s without hits"
    if forecast.vram_hit < 1:
        alone += f", {ceiling_tok_s(model.token_nbytes, gpu.h2d, forecast.vram_hit):.2f} with {forecast.vram_hit:.0%}"
    read = model.token_nbytes + model.resident_read_nbytes + model.head_nbytes
    yield f"  ceilings: {alone}; VRAM alone {ceiling_tok_s(read, gpu.read):.2f}"
    yield (
        f"  prefill: {prefill.tokens} tokens in chunks of {forecast.ram.chunk}: {prefill.tok_s:.1f} tok/s, first token "
        f"after {format_time(forecast.ttft_s)}, bound by {prefill.binding}"
    )
    for what, tok_s in forecast.gains:
        yield f"  {what:<30} {tok_s:>6.2f} tok/s  {tok_s / decode.tok_s - 1:>+5.0%}"


def gpu_facts(page: Page, forecast: GpuForecast) -> None:
    """The numbers at the head of the page."""
    if forecast.decode and forecast.prefill:
        page.fact(f"decode, {forecast.name}", f"{forecast.decode.tok_s:.2f} tok/s")
        page.fact(f"first token of {forecast.prefill.tokens}, GPU", format_time(forecast.ttft_s))


def gpu_section(page: Page, found: Sequence[tuple[str, GpuForecast]], best: GpuForecast, lines: Sequence[str]) -> None:
    """Where the time goes with a GPU, by recipe, and what would help."""
    rows = {recipe: _milliseconds(forecast) for recipe, forecast in found if forecast.decode}
    section = page.section(f"On {best.name}", *lines)
    if rows:
        section.chart(stacked_bars(rows, x_label="milliseconds per token, --device cuda"))
    if best.gains and best.decode:
        now = best.decode.tok_s
        page.section(f"What would help on {best.name}").table(
            ["one change", "decode", "gain"],
            [[what, f"{tok_s:.2f} tok/s", f"{tok_s / now - 1:+.0%}"] for what, tok_s in best.gains],
        )


def vram_bars(forecast: GpuForecast) -> dict[str, float]:
    """GiB of VRAM by what they hold; nothing where it does not run."""
    vram, gib = forecast.vram, 1 << 30
    if vram is None:
        return {}
    return {
        "expert slots": vram.slots * vram.slot_nbytes / gib,
        "resident weights": vram.resident / gib,
        "KV cache": vram.kv_cache / gib,
        "working memory": vram.working / gib,
        "process": vram.driver / gib,
    }


def _milliseconds(forecast: GpuForecast) -> dict[str, float]:
    decode = forecast.decode
    assert decode is not None
    return {
        "waiting for the drive": 1000 * decode.stall_s,
        "copies": 1000 * decode.link_s,
        "processor": 1000 * decode.processor_s,
        "device": 1000 * decode.device_s,
        "overhead": 1000 * decode.overhead_s,
    }


def _parts(forecast: GpuForecast) -> str:
    decode = forecast.decode
    assert decode is not None
    return (
        f"{format_size(decode.copied_nbytes)} over the link {format_time(decode.link_s)}, waiting for the drive "
        f"{format_time(decode.stall_s)}, device {format_time(decode.device_s)}, overhead "
        f"{format_time(decode.overhead_s)}"
    )
