"""Charts as SVG text that can stand inside a page: curves, stacked bars, heat maps.

Owns the style of all charts. Same values, same bytes: no dates and no random ids, so that a report can be compared
with an older one. matplotlib is imported when the first chart is drawn, since most commands draw none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#3266ad", "#e0912f", "#3f9a5c", "#c2493d", "#7d62b3", "#4aa3a2", "#8a6a4f", "#d277a8", "#6b6f76", "#b5a42e")
_WIDTH = 9.0
"""Inches; a page scales charts to its own width."""


@dataclass(frozen=True)
class Curve:
    """One named line; `reference` draws it grey and dashed, as something to compare with."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    reference: bool = False


def line_chart(
    curves: Sequence[Curve], *, x_label: str, y_label: str, percent: bool = False, log_x: bool = False
) -> str:
    """Curves over a common axis. `percent` shows y from 0 to 1 as 0 to 100%."""
    figure, axes = _new(3.4)
    colors = iter(COLORS * (1 + len(curves) // len(COLORS)))
    for curve in curves:
        style: dict[str, Any] = (
            {"color": "#9a9a9a", "linestyle": "--"}
            if curve.reference
            else {"color": next(colors), "marker": "o" if len(curve.x) <= 24 else None, "markersize": 3.5}
        )
        axes.plot(curve.x, curve.y, label=curve.name, linewidth=1.8, **style)
    if log_x:
        axes.set_xscale("log")
    if percent:
        axes.yaxis.set_major_formatter(_percent())
        axes.set_ylim(0, 1.02)
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    if len(curves) > 1:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return _svg(figure)


def stacked_bars(rows: Mapping[str, Mapping[str, float]], *, x_label: str) -> str:
    """One horizontal bar per row, cut into its named parts; equal names have equal colours in all rows."""
    figure, axes = _new(0.9 + 0.42 * len(rows))
    parts = list(dict.fromkeys(name for row in rows.values() for name in row))
    names = list(rows)
    left = np.zeros(len(names))
    for index, part in enumerate(parts):
        sizes = np.array([rows[name].get(part, 0.0) for name in names])
        axes.barh(names, sizes, left=left, height=0.62, color=COLORS[index % len(COLORS)], label=part)
        left += sizes
    axes.invert_yaxis()
    axes.set_xlabel(x_label)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    if len(parts) > 1:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return _svg(figure)


def heat_map(
    values: ArrayLike, *, rows: Sequence[str], x_label: str, y_label: str, label: str, center: float | None = None
) -> str:
    """Cells coloured by values [R, C]; with `center` by their ratio to it: blue above, red below."""
    from matplotlib.colors import LogNorm

    cells = np.asarray(values, float)
    figure, axes = _new(1.0 + min(6.0, 0.2 * len(rows)))
    if center is None:
        image = axes.imshow(cells, aspect="auto", interpolation="nearest", cmap="Blues")
    else:
        bounded = np.clip(cells, center / 4, center * 4)
        image = axes.imshow(
            bounded, aspect="auto", interpolation="nearest", cmap="RdBu", norm=LogNorm(center / 4, center * 4)
        )
    step = max(1, len(rows) // 30)
    axes.set_yticks(range(0, len(rows), step), rows[::step])
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    bar = figure.colorbar(image, ax=axes, pad=0.015, label=label)
    if center is not None:
        marks = [center / 4, center / 2, center, center * 2, center * 4]
        bar.set_ticks(marks, labels=[f"{mark:.3g}" for mark in marks])
        bar.minorticks_off()
    return _svg(figure)


def _new(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(color="#9a9a9a", labelsize=9)
    return figure, axes


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0, decimals=0)


def _svg(figure: Figure) -> str:
    """The figure as an <svg> element. Text stays text: it can be selected, and the file is small."""
    from matplotlib import rc_context

    out = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "expertpager", "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return re.sub(r"^.*?(?=<svg)", "", text, count=1, flags=re.DOTALL)
