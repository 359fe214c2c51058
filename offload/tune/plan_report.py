"""A plan for a model on a machine, as lines for people, values for machines, and a page with charts.

Owns how a plan is told. The answers are `plan`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from offload.config import ModelConfig
from offload.errors import UsageError
from offload.report import Curve, Page, line_chart, stacked_bars
from offload.tune.budget import FREE_SHARE, floor_slots, kv_cache_nbytes
from offload.tune.cost import Footprint, ModelCost, ceiling_tok_s, decode_cost
from offload.tune.hits import CURVES, HitCurve
from offload.tune.machine import MachineSpec
from offload.tune.plan import RecipePlan, least_ram, plan_recipe
from offload.tune.plan_gpu_report import gpu_facts, gpu_lines, gpu_section, vram_bars
from offload.tune.setting import PROCESS_NBYTES, Setting
from offload.types import format_size, format_time


@dataclass(frozen=True)
class PlanReport:
    """The answer for a model: one plan per recipe."""

    name: str
    kind: str
    machine: MachineSpec
    setting: Setting
    curve: HitCurve
    plans: Sequence[RecipePlan]

    @property
    def best(self) -> RecipePlan | None:
        """The recipe that decodes fastest."""
        running = [plan for plan in self.plans if plan.decode]
        return max(running, key=lambda plan: plan.decode.tok_s if plan.decode else 0.0) if running else None

    @property
    def best_on_gpu(self) -> RecipePlan | None:
        """The recipe that decodes fastest on the GPU."""
        running = [plan for plan in self.plans if plan.gpu and plan.gpu.decode]
        return max(running, key=_gpu_tok_s) if running else None

    def lines(self) -> Iterator[str]:
        """For people."""
        yield from _report_lines(self)

    def page(self) -> Page:
        """For people, with charts."""
        return _page(self)

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return {
            "model": self.name,
            "kind": self.kind,
            "machine": self.machine.name,
            "hits_from": self.curve.name,
            "runs": self.best is not None or self.best_on_gpu is not None,
            "best": self.best.footprint.recipe if self.best else None,
            "best_on_gpu": self.best_on_gpu.footprint.recipe if self.best_on_gpu else None,
            "recipes": [_values(plan) for plan in self.plans],
        }


def plan_model(
    name: str,
    kind: str,
    footprints: Sequence[Footprint],
    machine: MachineSpec,
    setting: Setting | None = None,
    curve: HitCurve | None = None,
) -> PlanReport:
    """Plan every footprint. Raises UsageError for a setting that no machine could satisfy."""
    setting, curve = setting or Setting(), curve or CURVES["local"]
    if not footprints:
        raise UsageError(f"{name}: no recipe to plan")
    _check_setting(setting, machine, footprints[0].config)
    return PlanReport(
        name, kind, machine, setting, curve, [plan_recipe(item, machine, setting, curve) for item in footprints]
    )


def _check_setting(setting: Setting, machine: MachineSpec, config: ModelConfig) -> None:
    if setting.ram and setting.ram > machine.ram_total:
        raise UsageError(f"--ram {format_size(setting.ram)}: {machine.name} has {format_size(machine.ram_total)}")
    if setting.vram and (machine.gpu is None or setting.vram > machine.gpu.vram):
        has = format_size(machine.gpu.vram) if machine.gpu else "no GPU"
        raise UsageError(f"--vram {format_size(setting.vram)}: {machine.name} has {has}")
    if setting.split != Setting.split and machine.gpu is None:
        raise UsageError(f"--split {setting.split}: {machine.name} has no GPU")
    if setting.context and not 1 <= setting.context <= config.max_position_embeddings:
        raise UsageError(
            f"--context {setting.context}: the model's positions allow 1 to {config.max_position_embeddings}"
        )
    if setting.prefill_chunk is not None and setting.prefill_chunk < 1:
        raise UsageError(f"--prefill-chunk {setting.prefill_chunk}: a chunk has at least one token")


# -- for people ------------------------------------------------------------------------------


def _report_lines(report: PlanReport) -> Iterator[str]:
    yield from _premises(report)
    yield ""
    yield _row(_columns(report))
    for plan in report.plans:
        yield _row(_cells(report, plan))
    yield ""
    best = report.best
    if best is None or best.decode is None:
        yield from _refusal(report)
        return
    yield from _details(report, best)
    if best.gains:
        yield f"what would help (now {best.decode.tok_s:.2f} tok/s):"
        for what, tok_s in best.gains:
            yield f"  {what:<32} {tok_s:>6.2f} tok/s  {tok_s / best.decode.tok_s - 1:>+5.0%}"


def _premises(report: PlanReport) -> Iterator[str]:
    """What was asked: model, machine, hit rates, download."""
    machine, config = report.machine, report.plans[0].footprint.config
    layers, k = len(config.moe_layers), config.num_experts_per_tok
    yield f"{report.name}: {report.kind}, {layers} MoE layers x {config.n_routed_experts} experts, {k} per token"
    yield (
        f"machine: {machine.name}; RAM {format_size(machine.ram_total)} at {_rate(machine.ram_read)}, "
        f"drive {_rate(machine.drive_read)}, {machine.threads} threads"
    )
    yield f"hit rates: {report.curve.name}" + ("" if report.curve.name.startswith("trace") else " (preset)")
    if download := report.plans[0].footprint.download_nbytes:
        took = f", {format_time(download / machine.download)} at {_rate(machine.download)}" if machine.download else ""
        yield f"download: {download / 1e9:.1f} GB{took}; nothing of it is kept beside the store"


def _columns(report: PlanReport) -> list[str]:
    columns = ["recipe", "store", "expert", "per token", "slots", "share", "hits", "decode", "prefill", "TTFT"]
    return [*columns, *(["on the GPU"] if report.machine.gpu else []), "bound by"]


_WIDTHS = (9, 9, 9, 6, 5, 5, 12, 12, 8, 12)


def _row(cells: Sequence[str]) -> str:
    name, *others, last = cells
    shown = " ".join(f"{cell:>{width}}" for cell, width in zip(others, _WIDTHS, strict=False))
    return f"{name:<18} {shown}  {last}"


def _details(report: PlanReport, plan: RecipePlan) -> Iterator[str]:
    assert plan.ram and plan.decode and plan.decode_flat and plan.prefill
    config, ram, decode = plan.footprint.config, plan.ram, plan.decode
    model = ModelCost.of(plan.footprint)
    yield f"{plan.footprint.recipe}: {ram.describe()}"
    per_token = kv_cache_nbytes(config, 1)
    yield f"KV cache: {per_token / 1024:.1f} KiB per token of context"
    yield (
        f"decode: {decode.tok_s:.2f} tok/s with {report.curve.name} routing, {plan.decode_flat.tok_s:.2f} with flat; "
        f"per token {decode.read_nbytes / 1e9:.2f} GB from the drive, waiting {format_time(decode.stall_s)}, "
        f"experts {format_time(decode.experts_s)}, other weights {format_time(decode.resident_s)}"
    )
    drive = f"drive alone {ceiling_tok_s(model.token_nbytes, report.machine.drive_read):.2f} tok/s without hits"
    if plan.hit < 1:
        drive += f", {ceiling_tok_s(model.token_nbytes, report.machine.drive_read, plan.hit):.2f} with {plan.hit:.0%}"
    ram_alone = ceiling_tok_s(model.token_nbytes + model.resident_read_nbytes, report.machine.ram_read)
    yield f"ceilings: {drive}; RAM alone {ram_alone:.2f}"
    assert plan.ram is not None
    yield (
        f"prefill: {plan.prefill.tokens} tokens in chunks of {plan.ram.chunk}: first token after "
        f"{format_time(plan.ttft_s)}, bound by {plan.prefill.binding}"
    )
    if plan.conversion_s:
        yield f"conversion: about {format_time(plan.conversion_s)}"
    elif plan.footprint.download_nbytes:
        yield "conversion: time unknown; the machine file has neither network.download nor cpu.encode"
    yield from _on_gpu(report, plan)
    for warning in report.machine.warnings:
        yield f"warning: {warning}"


def _gpu_tok_s(plan: RecipePlan) -> float:
    return plan.gpu.decode.tok_s if plan.gpu and plan.gpu.decode else 0.0


def _on_gpu(report: PlanReport, plan: RecipePlan) -> Iterator[str]:
    if plan.gpu and report.machine.gpu:
        yield from gpu_lines(plan.gpu, ModelCost.of(plan.footprint), report.machine.gpu)


def _refusal(report: PlanReport) -> Iterator[str]:
    where = "without its GPU " if report.best_on_gpu else ""
    yield f"does not run {where}on {report.machine.name}:"
    for plan in report.plans:
        for problem in plan.problems:
            yield f"  {plan.footprint.recipe}: {problem}"
    least = min(report.plans, key=lambda plan: least_ram(plan.footprint, report.setting))
    need = least_ram(least.footprint, report.setting)
    total = round((need - PROCESS_NBYTES) / FREE_SHARE)
    yield (
        f"what would: {format_size(need)} of RAM for this process with recipe {least.footprint.recipe} "
        f"(--ram, or {format_size(total)} free)"
    )
    if best := report.best_on_gpu:
        yield f"recipe {best.footprint.recipe}, whose resident weights VRAM holds:"
        yield from _on_gpu(report, best)


# -- the page --------------------------------------------------------------------------------


def _page(report: PlanReport) -> Page:
    about, *premises = _premises(report)
    page = Page(f"{report.name} on {report.machine.name}", about)
    plan = report.best
    if plan is None or plan.ram is None or plan.decode is None or plan.prefill is None:
        page.section("It does not run", *premises, *_refusal(report))
        return page
    page.fact(f"decode, {plan.footprint.recipe}", f"{plan.decode.tok_s:.2f} tok/s")
    page.fact("prefill", f"{plan.prefill.tok_s:.1f} tok/s")
    page.fact(f"first token of {plan.prefill.tokens}", format_time(plan.ttft_s))
    page.fact("store", format_size(plan.footprint.store_nbytes))
    page.fact("bound by", plan.decode.binding)
    if plan.gpu:
        gpu_facts(page, plan.gpu)
    page.section("Memory", plan.ram.describe()).chart(_memory_chart(plan))
    page.section("Where the time goes", "One decoded token, by recipe.").chart(_time_chart(report))
    page.section(
        "Speed by RAM",
        f"Recipe {plan.footprint.recipe}; every point is a budget for the whole process. The vertical distance of the "
        "curves is what your routing decides: record a trace and give it as --hits.",
    ).chart(_ram_chart(report, plan))
    page.section("Recipes").table(_columns(report), [_cells(report, item) for item in report.plans])
    if plan.gains:
        page.section("What would help").table(
            ["one change", "decode", "gain"],
            [[what, f"{tok_s:.2f} tok/s", f"{tok_s / plan.decode.tok_s - 1:+.0%}"] for what, tok_s in plan.gains],
        )
    if plan.gpu:
        found = [(item.footprint.recipe, item.gpu) for item in report.plans if item.gpu]
        gpu_section(page, found, plan.gpu, list(_on_gpu(report, plan)))
    page.section("In words", *premises, *_details(report, plan))
    return page


def _memory_chart(plan: RecipePlan) -> str:
    assert plan.ram is not None
    ram, gib = plan.ram, 1 << 30
    rows = {
        "RAM": {
            "expert slots": ram.slots * ram.slot_nbytes / gib,
            "resident weights": ram.resident / gib,
            "KV cache": ram.kv_cache / gib,
            "working memory": ram.working / gib,
            "process": ram.process / gib,
        }
    }
    if plan.gpu and (held := vram_bars(plan.gpu)):
        rows["VRAM"] = held
    return stacked_bars(rows, x_label="GiB")


def _time_chart(report: PlanReport) -> str:
    rows = {
        plan.footprint.recipe: {
            "waiting for the drive": 1000 * plan.decode.stall_s,
            "routed experts": 1000 * plan.decode.experts_s,
            "other weights": 1000 * plan.decode.resident_s,
            "overhead": 1000 * plan.decode.overhead_s,
        }
        for plan in report.plans
        if plan.decode
    }
    return stacked_bars(rows, x_label="milliseconds per token")


def _ram_chart(report: PlanReport, plan: RecipePlan) -> str:
    """Decode speed from one token's working set to every expert in RAM."""
    assert plan.ram is not None
    model, ram = ModelCost.of(plan.footprint), plan.ram
    least = min(floor_slots(model.config), model.expert_count)
    slots = [round(least + (model.expert_count - least) * part / 23) for part in range(24)]
    budgets = [(ram.fixed + count * ram.slot_nbytes) / 2**30 for count in slots]
    context = report.setting.context_of(model.config) // 2

    def speeds(curve: HitCurve) -> list[float]:
        demands = [curve.demand(count / model.expert_count) for count in slots]
        return [decode_cost(model, report.machine, demand, context).tok_s for demand in demands]

    curves = [Curve(report.curve.name, budgets, speeds(report.curve))]
    curves += [
        Curve(name, budgets, speeds(curve), reference=True)
        for name, curve in CURVES.items()
        if name in ("local", "flat") and name != report.curve.name
    ]
    return line_chart(curves, x_label="RAM of the process, GiB", y_label="decode tok/s")


def _cells(report: PlanReport, plan: RecipePlan) -> list[str]:
    footprint, model = plan.footprint, ModelCost.of(plan.footprint)
    cells = [
        footprint.recipe,
        f"{footprint.store_nbytes / 1e9:.1f} GB",
        f"{model.expert_nbytes / 1e6:.2f} MB",
        f"{model.token_nbytes / 1e9:.2f} GB",
    ]
    speed = f"{_gpu_tok_s(plan):.2f} tok/s" if _gpu_tok_s(plan) else ""
    on_gpu = [speed] if report.machine.gpu else []
    if plan.ram is None or plan.decode is None or plan.prefill is None:
        return [*cells, *[""] * 6, *on_gpu, "only there" if speed else "does not run"]
    return [
        *cells,
        str(plan.ram.slots),
        f"{plan.share:.0%}",
        f"{plan.hit:.0%}",
        f"{plan.decode.tok_s:.2f} tok/s",
        f"{plan.prefill.tok_s:.1f} tok/s",
        format_time(plan.ttft_s),
        *on_gpu,
        plan.decode.binding,
    ]


def _values(plan: RecipePlan) -> dict[str, Any]:
    footprint, model = plan.footprint, ModelCost.of(plan.footprint)
    values: dict[str, Any] = {
        "recipe": footprint.recipe,
        "experts": footprint.experts,
        "resident": footprint.resident,
        "runs": plan.runs,
        "problems": list(plan.problems),
        "download_bytes": footprint.download_nbytes,
        "store_bytes": footprint.store_nbytes,
        "resident_bytes": footprint.resident_nbytes,
        "expert_bytes": model.expert_nbytes,
        "experts_total": model.expert_count,
        "experts_bytes": model.experts_nbytes,
        "bytes_per_token": model.token_nbytes,
        "conversion_s": plan.conversion_s,
        "gpu": plan.gpu.to_dict() if plan.gpu else None,
    }
    if plan.ram and plan.decode and plan.decode_flat and plan.prefill:
        values |= {
            "ram": {**asdict(plan.ram), "total": plan.ram.total},
            "share": plan.share,
            "hit_rate": plan.hit,
            "decode_tok_s": plan.decode.tok_s,
            "decode_tok_s_flat": plan.decode_flat.tok_s,
            "decode": asdict(plan.decode),
            "bound_by": plan.decode.binding,
            "prefill_tok_s": plan.prefill.tok_s,
            "prefill": asdict(plan.prefill),
            "ttft_s": plan.ttft_s,
            "gains": dict(plan.gains),
        }
    return values


def _rate(value: float | None) -> str:
    return f"{(value or 0) / 1e9:.3g} GB/s"
