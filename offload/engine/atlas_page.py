"""The atlas as a page: which experts work, for what, how evenly, how often again.

Owns what is shown and the words around it. Computes no statistics: those are `cache.atlas`; draws nothing: that
is `report`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from offload.cache.atlas import HOT_SHARE, Atlas
from offload.report import Curve, Page, heat_map, line_chart

_RANKS = ("first", "second", "third", "fourth", "fifth")


def atlas_page(atlas: Atlas, title: str) -> Page:
    """The page of `atlas`."""
    shape = atlas.shape
    counted = ", ".join(f"{name} ({count:,} tokens)" for name, count in zip(atlas.domains, atlas.tokens, strict=True))
    page = Page(title, f"{shape.layers} MoE layers of {shape.experts} experts, {shape.top_k} per token. {counted}.")
    _facts(page, atlas)
    layers = [str(atlas.first_layer + layer) for layer in range(shape.layers)]
    _use(page, atlas, layers)
    _specialization(page, atlas, layers)
    _coverage(page, atlas)
    _reuse(page, atlas, layers)
    _overlap(page, atlas)
    _load(page, atlas, layers)
    return page


def _facts(page: Page, atlas: Atlas) -> None:
    quarter = max(1, round(HOT_SHARE * atlas.shape.experts)) - 1
    page.fact("experts in all", f"{atlas.shape.keys:,}")
    page.fact("used at all", f"{(atlas.counts.sum(0) > 0).mean():.0%}")
    page.fact("MaxVio, mean over layers", f"{atlas.max_violation.mean():.2f}")
    page.fact("expert-domain information", f"{atlas.information.mean():.3f} bits")
    page.fact(f"of a domain's choices go to its top {HOT_SHARE:.0%}", f"{atlas.domain_coverage[:, quarter].mean():.0%}")
    page.fact("reused from the token before", f"{atlas.reuse.mean():.0%}")


def _use(page: Page, atlas: Atlas, layers: Sequence[str]) -> None:
    section = page.section(
        "Use of every expert",
        "A row per layer, a column per expert, against an even load (1): first all domains alike, then each domain. "
        "Balanced training makes the first map pale; what stays coloured in the others is specialization.",
    )
    for name, load in [("all domains", atlas.load), *zip(atlas.domains, atlas.use, strict=True)]:
        section.chart(
            heat_map(
                load * atlas.shape.experts,
                rows=layers,
                x_label=f"expert · {name}",
                y_label="layer",
                label="use",
                center=1,
            )
        )


def _specialization(page: Page, atlas: Atlas, layers: Sequence[str]) -> None:
    section = page.section(
        "Specialization per layer",
        "Mutual information between expert and domain. Chance alone gives the dashed line; every domain using experts "
        f"of its own would give {np.log2(len(atlas.domains)):.2f} bits.",
    )
    x = [atlas.first_layer + layer for layer in range(atlas.shape.layers)]
    curves = [
        Curve("information", x, atlas.information.tolist()),
        Curve("by chance", x, atlas.information_floor.tolist(), reference=True),
    ]
    section.chart(line_chart(curves, x_label="layer", y_label="bits"))
    if len(atlas.domains) < 2:
        return
    experts = page.section(
        "Specialists",
        f"For each domain the experts with the largest part of their use in it (an even part would be "
        f"{1 / len(atlas.domains):.0%}), among those with at least an even load there.",
    )
    rows = []
    for domain, name in enumerate(atlas.domains):
        found = atlas.specialists(domain, len(_RANKS))
        cells = [f"{layers[one.layer]} / {one.expert}: {one.share:.0%}" for one in found]
        rows.append([name, *cells, *[""] * (len(_RANKS) - len(cells))])
    experts.table(("layer / expert", *_RANKS), rows)


def _coverage(page: Page, atlas: Atlas) -> None:
    section = page.section(
        "Coverage",
        "Share of a layer's choices that its most used experts take, mean over layers. A cache that holds so many "
        "experts of every layer could answer that share, if use never changed.",
    )
    x = list(range(1, atlas.shape.experts + 1))
    even = [n / atlas.shape.experts for n in x]
    curves = [Curve("all domains", x, atlas.coverage.tolist())]
    curves += [Curve(name, x, row.tolist()) for name, row in zip(atlas.domains, atlas.domain_coverage, strict=True)]
    section.chart(
        line_chart([*curves, Curve("even load", x, even, reference=True)], x_label="experts", y_label="", percent=True)
    )


def _reuse(page: Page, atlas: Atlas, layers: Sequence[str]) -> None:
    section = page.section("Reuse", "Share of a token's experts that the token before it also used.")
    x = [atlas.first_layer + layer for layer in range(atlas.shape.layers)]
    curves = [Curve(name, x, row.tolist()) for name, row in zip(atlas.domains, atlas.reuse, strict=True)]
    chance = Curve("by chance", x, [atlas.chance_reuse] * len(x), reference=True)
    section.chart(line_chart([*curves, chance], x_label="layer", y_label="", percent=True))


def _overlap(page: Page, atlas: Atlas) -> None:
    section = page.section(
        "Overlap of domains",
        f"Jaccard index of the most used {HOT_SHARE:.0%} of the experts, mean over layers; 1: the same ones.",
    )
    rows = zip(atlas.domains, atlas.overlap, strict=True)
    section.table(("", *atlas.domains), [[name, *(f"{value:.2f}" for value in row)] for name, row in rows])


def _load(page: Page, atlas: Atlas, layers: Sequence[str]) -> None:
    columns = {
        "MaxVio": atlas.max_violation,
        "CV": atlas.variation,
        "Gini": atlas.gini,
        "entropy (bits)": atlas.entropy,
        "information (bits)": atlas.information,
        "by chance (bits)": atlas.information_floor,
    }
    section = page.section(
        "Load",
        f"All domains alike. MaxVio: the busiest expert over the mean, less 1. Entropy of an even load: "
        f"{np.log2(atlas.shape.experts):.2f} bits.",
    )
    rows = [[name, *(f"{column[i]:.3f}" for column in columns.values())] for i, name in enumerate(layers)]
    section.table(("layer", *columns), rows)
