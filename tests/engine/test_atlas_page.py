"""The page of an atlas: it stands alone, and what it shows are the atlas's numbers."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser

import pytest

from offload.cache.atlas import Atlas, make_atlas
from offload.engine.atlas_page import atlas_page
from tests.cache.test_atlas import EXPERTS, LAYERS, TRACES


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return make_atlas(TRACES, first_layer=1)


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found[tag] += 1
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_it_needs_nothing_else_and_draws_every_plot(atlas: Atlas) -> None:
    page = atlas_page(atlas, "Atlas of <model>").html()
    tags = _Tags()
    tags.feed(page)
    assert all(link.startswith(("#", "data:")) for link in tags.links)
    assert "<script" not in page and "Atlas of <model>" not in page and "Atlas of &lt;model&gt;" in page
    assert tags.found["svg"] == (1 + len(TRACES)) + 3  # heat maps, specialization, coverage, reuse
    assert "nan" not in page.lower().replace("nano", "")


def test_tables_hold_the_atlas_numbers(atlas: Atlas) -> None:
    page = atlas_page(atlas, "x").html()
    rows = {
        re.sub(r"<.*?>", "", row.split("</th>")[0]): re.findall(r"<td>(.*?)</td>", row)
        for row in re.findall(r"<tr>(<th>.*?)</tr>", page)
    }
    for layer in range(LAYERS):
        shown = [float(cell) for cell in rows[str(layer + 1)]]
        load = (atlas.max_violation, atlas.variation, atlas.gini, atlas.entropy, atlas.information)
        assert shown == pytest.approx([values[layer] for values in (*load, atlas.information_floor)], abs=6e-4)
    overlap = page[page.index("Overlap of domains") :]
    for i, name in enumerate(atlas.domains):
        row = re.search(rf"<tr><th>{name}</th>(.*?)</tr>", overlap)
        assert row and [float(c) for c in re.findall(r"<td>(.*?)</td>", row[1])] == pytest.approx(
            atlas.overlap[i].tolist(), abs=6e-3
        )
        best = atlas.specialists(i, 1)[0]
        assert f"{best.layer + 1} / {best.expert}: {best.share:.0%}" in page
    assert f"<b>{LAYERS * EXPERTS}</b>" in page


def test_one_domain_has_no_specialists() -> None:
    page = atlas_page(make_atlas({"code": TRACES["code"]}), "x").html()
    assert "Specialists" not in page and "Specialization per layer" in page
