"""The page escapes what it is given, charts are well-formed SVG with the given values, and both repeat byte by byte."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from offload.errors import UsageError
from offload.report import Curve, Page, heat_map, line_chart, stacked_bars

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> str:
    return " ".join("".join(node.itertext()) for node in ElementTree.fromstring(svg).iter(f"{SVG}text"))


def path_of(svg: str, color: str) -> list[tuple[float, float]]:
    """Points of the line drawn in `color`."""
    found = re.search(rf'<path d="([^"]*)"[^>]*stroke: {color}', svg)
    assert found is not None
    numbers = [float(n) for n in re.findall(r"-?\d+\.?\d*", found[1])]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_lines_have_the_values_proportions() -> None:
    svg = line_chart(
        [Curve("lru", [0, 1, 2], [0.0, 0.25, 1.0]), Curve("belady", [0, 2], [0.5, 0.5], reference=True)],
        x_label="slots",
        y_label="hits",
        percent=True,
    )
    (x0, y0), (x1, y1), (x2, y2) = path_of(svg, "#3266ad")
    assert (x1 - x0) == pytest.approx(x2 - x1, rel=1e-3)
    assert (y0 - y1) / (y0 - y2) == pytest.approx(0.25, rel=1e-3)
    shown = texts(svg)
    assert all(word in shown for word in ("lru", "belady", "slots", "hits", "100%"))


def test_bars_name_every_part_once() -> None:
    svg = stacked_bars({"4 GB": {"slots": 3.0, "kv": 1.0}, "8 GB": {"slots": 7.0}}, x_label="GB")
    shown = texts(svg)
    assert [shown.count(word) for word in ("slots", "kv", "4 GB", "8 GB")] == [1, 1, 1, 1]


def test_heat_map_of_one_row_and_with_a_center() -> None:
    for center in (None, 1.0):
        svg = heat_map(
            np.array([[0.0, 1.0, 9.0]]), rows=["7"], x_label="expert", y_label="layer", label="load", center=center
        )
        assert "<image" in svg and "expert" in texts(svg)


def test_charts_and_pages_repeat_byte_by_byte() -> None:
    def page() -> str:
        made = Page("t")
        made.section("s").chart(line_chart([Curve("a", [1, 2], [3, 4])], x_label="x", y_label="y"))
        return made.html()

    assert page() == page()


def test_everything_but_charts_is_escaped_and_stands_in_order(tmp_path: Path) -> None:
    page = Page("<b>title", "lead & more")
    page.fact("tok/s", "<4>")
    page.section("first <i>", "one", "two").table(["<c>", "n"], [["<r>", 5]]).chart("<svg id='mine'></svg>")
    page.section("second")
    html = page.write(tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"<b>title|<i>|<r>|<c>|<4>", html)
    assert "<svg id='mine'></svg>" in html and "lead &amp; more" in html
    order = ("&lt;b&gt;title", "&lt;4&gt;", "first &lt;i&gt;", "<p>two", "mine", "second")
    places = [html.index(text) for text in order]
    assert places == sorted(places)
    assert "http" not in re.sub(r"<svg.*?</svg>", "", html, flags=re.DOTALL)  # nothing is fetched


def test_a_page_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none"):
        Page("t").write(tmp_path / "none" / "page.html")
