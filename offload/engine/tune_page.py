"""A search for options as a page: speed of every trial, and hits by number of slots.

Owns how `TuneReport` is drawn. The hit rates are replays of the routing that the first trial recorded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload.engine.options import LIVE_POLICIES
from offload.report import Curve, Page, line_chart, stacked_bars
from offload.tune.hits import measured_curve

if TYPE_CHECKING:
    from offload.engine.tuning import Trial, TuneReport

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def tune_page(report: TuneReport) -> Page:
    """The page of `expertpager tune --html`."""
    before, after = report.before, report.after
    page = Page("Options tuned for this machine", "Every trial generated the same tokens.")
    page.fact("before", f"{before.tok_s:.2f} tok/s")
    page.fact("after", f"{after.tok_s:.2f} tok/s")
    page.fact("gain", f"{after.tok_s / before.tok_s - 1:+.0%}")
    page.fact("expert slots", f"{before.slots} -> {after.slots}")
    rows = {"as it was": {"milliseconds per token": 1000 / before.tok_s}}
    for number, step in enumerate(report.steps, 1):
        if step.tok_s:
            name = f"{number}. {step.what}" + (" (kept)" if step.kept else "")
            rows[name] = {"milliseconds per token": 1000 / step.tok_s}
    page.section("Trials", "Each beside the best before it; what was kept is where the next ones began.").chart(
        stacked_bars(rows, x_label="milliseconds per decoded token")
    )
    if before.trace is not None and len(before.trace.tokens):
        page.section(
            "Hits by slots", "The recorded prompts, replayed: share of demands in decoding that need no read."
        ).chart(_hit_chart(before, after))
    page.section("Every trial").table(
        ["change", "tok/s", "", "note"],
        [
            [s.what, f"{s.tok_s:.2f}" if s.tok_s else "not run", "kept" if s.kept else "dropped", s.note]
            for s in report.steps
        ],
    )
    return page


def _hit_chart(before: Trial, after: Trial) -> str:
    trace = before.trace
    assert trace is not None
    curves = []
    for policy in LIVE_POLICIES:
        # The policy that was found has the half-life that was found, not that of the recording; others have their own.
        half_life = after.options.half_life if policy == after.options.policy else None
        curve = measured_curve(trace, policy, "", SHARES, half_life=half_life)
        slots = [share * trace.shape.keys for share in curve.shares]
        curves.append(Curve(policy, slots, curve.hits, reference=policy != after.options.policy))
    return line_chart(curves, x_label=f"expert slots of {trace.shape.keys}", y_label="hits", percent=True)
