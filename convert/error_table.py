"""What quantization cost: errors of the routed experts against the source, as a table, a plot and a page.

Owns the statistics over the errors that a manifest records, and how they are shown. Reads manifests only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from offload.report import Curve, Page, heat_map, line_chart
from offload.store.manifest import Manifest
from offload.types import PROJECTIONS

_BAR = 30
_WORST = 10
_FAR = 6.0  # standard deviations, estimated from the median deviation, beyond which an expert is an outlier


@dataclass(frozen=True)
class ExpertError:
    """Relative RMSE of one matrix; `ratio` compares it with the median of its layer and projection."""

    error: float
    layer: int
    expert: int
    projection: str
    ratio: float

    def __str__(self) -> str:
        where = f"layer {self.layer} expert {self.expert} {self.projection}"
        return f"{where}: {self.error:.5f}, {self.ratio:.2f} times the median of its layer"

    def to_dict(self) -> dict[str, Any]:
        """The same for machines."""
        return {
            "error": self.error,
            "layer": self.layer,
            "expert": self.expert,
            "projection": self.projection,
            "ratio_to_median": self.ratio,
        }


@dataclass(frozen=True)
class ErrorTable:
    """Relative RMSE against the source: `errors[layer]` [experts, projections], the worst ones, the outliers."""

    errors: dict[int, np.ndarray]
    worst: list[ExpertError]
    outliers: list[ExpertError]

    @classmethod
    def of(cls, manifest: Manifest) -> ErrorTable:
        """The errors that `manifest` records."""
        errors = {layer: np.array(record.errors) for layer, record in sorted(manifest.layers.items())}
        everything = [item for layer, values in errors.items() for item in _expert_errors(layer, values)]
        worst = sorted(everything, key=lambda item: (-item.error, item.layer, item.expert))[:_WORST]
        far = [item for layer, values in errors.items() for item in _outliers(layer, values)]
        return cls(errors, worst, sorted(far, key=lambda item: (-item.ratio, item.layer, item.expert)))

    def lines(self) -> list[str]:
        """A table with a plot beside it, and the experts that stand out."""
        head = "".join(f"{projection:>20}" for projection in PROJECTIONS)
        lines = ["relative RMSE of the routed experts against the source, mean (largest)", f"layer{head}"]
        top = max((float(values.mean()) for values in self.errors.values()), default=0.0)
        for layer, values in self.errors.items():
            columns = zip(values.mean(axis=0), values.max(axis=0), strict=True)
            cells = "".join(f"{f'{mean:.5f} ({largest:.5f})':>20}" for mean, largest in columns)
            bar = "#" * round(_BAR * float(values.mean()) / top) if top else ""
            lines.append(f"{layer:>5}{cells}  |{bar}")
        lines += ["worst experts:", *(f"  {item}" for item in self.worst)]
        if self.outliers:
            lines.append(f"outliers in their layer: {len(self.outliers)}")
            lines += [f"  {item}" for item in self.outliers[:_WORST]]
        else:
            lines.append("no outliers: the errors of every layer lie close together")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The same for machines."""
        layers = {}
        for layer, values in self.errors.items():
            columns = zip(PROJECTIONS, values.mean(axis=0), values.max(axis=0), strict=True)
            layers[str(layer)] = {name: {"mean": float(mean), "max": float(high)} for name, mean, high in columns}
        return {
            "errors": layers,
            "worst_experts": [item.to_dict() for item in self.worst],
            "outliers": [item.to_dict() for item in self.outliers],
        }

    def page(self, title: str, recipe: str) -> Page:
        """The same with charts."""
        page = Page(title, f"Relative RMSE of the routed experts ({recipe}) against the source.")
        everything = np.concatenate([values.ravel() for values in self.errors.values()])
        page.fact("mean error", f"{everything.mean():.5f}")
        page.fact("largest error", f"{everything.max():.5f}")
        page.fact("outliers", str(len(self.outliers)))
        layers = list(self.errors)
        curves = []
        for column, projection in enumerate(PROJECTIONS):
            curves.append(Curve(projection, layers, [float(v[:, column].mean()) for v in self.errors.values()]))
        curves.append(Curve("largest", layers, [float(v.max()) for v in self.errors.values()], reference=True))
        page.section("By layer", "Mean over the experts of a layer, and the largest error of any of them.").chart(
            line_chart(curves, x_label="layer", y_label="relative RMSE")
        )
        page.section("By expert", "Mean of the three projections.").chart(
            heat_map(
                np.stack([values.mean(axis=1) for values in self.errors.values()]),
                rows=[str(layer) for layer in layers],
                x_label="expert",
                y_label="layer",
                label="relative RMSE",
            )
        )
        for name, items in (("Worst experts", self.worst), ("Outliers in their layer", self.outliers)):
            rows = [(str(i.layer), i.expert, i.projection, f"{i.error:.5f}", f"{i.ratio:.2f}") for i in items]
            if rows:
                page.section(name).table(("layer", "expert", "projection", "error", "times the median"), rows)
        return page


def _expert_errors(layer: int, values: np.ndarray) -> Iterator[ExpertError]:
    median = np.median(values, axis=0)
    for (expert, column), error in np.ndenumerate(values):
        ratio = float(error / median[column]) if median[column] else 1.0
        yield ExpertError(float(error), layer, expert, PROJECTIONS[column], ratio)


def _outliers(layer: int, values: np.ndarray) -> Iterator[ExpertError]:
    """Errors far above the rest of their layer and projection. The median deviation is not moved by them."""
    median = np.median(values, axis=0)
    spread = 1.4826 * np.median(np.abs(values - median), axis=0)
    # Six digits are recorded: differences in the last ones are no deviation.
    limit = median + _FAR * np.maximum(spread, 1e-3 * median)
    for item in _expert_errors(layer, values):
        if item.error > limit[PROJECTIONS.index(item.projection)]:
            yield item
