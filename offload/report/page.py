"""A page: title, facts, then sections of text, charts and tables, as one HTML file that needs nothing else.

Owns structure and escaping. Everything but charts is text and is escaped; charts are the SVG of `charts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from markupsafe import Markup

from offload.errors import UsageError


@dataclass(frozen=True)
class _Table:
    columns: Sequence[str]
    rows: list[Sequence[str]]


@dataclass
class Section:
    """One heading with what stands under it: text first, then charts, then tables."""

    title: str
    text: list[str] = field(default_factory=list)
    charts: list[Markup] = field(default_factory=list)
    tables: list[_Table] = field(default_factory=list)

    def chart(self, svg: str) -> Section:
        """Add a chart made by `charts`."""
        self.charts.append(Markup(svg))
        return self

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Section:
        """Add a table; the first cell of a row is its name."""
        self.tables.append(_Table(columns, [[str(cell) for cell in row] for row in rows]))
        return self


class Page:
    """Collects what a report shows; `html` or `write` ends it."""

    def __init__(self, title: str, lead: str = "") -> None:
        self.title = title
        self.lead = lead
        self.facts: list[tuple[str, str]] = []
        self.sections: list[Section] = []

    def fact(self, name: str, value: str) -> None:
        """One of the few figures that everybody looks for first."""
        self.facts.append((name, value))

    def section(self, title: str, *text: str) -> Section:
        """Begin a section; `text` are paragraphs."""
        self.sections.append(Section(title, list(text)))
        return self.sections[-1]

    def html(self) -> str:
        """The whole document."""
        from jinja2 import Environment

        template = files("offload.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
        environment = Environment(autoescape=True, keep_trailing_newline=True)
        return environment.from_string(template).render(
            title=self.title, lead=self.lead, facts=self.facts, sections=self.sections
        )

    def write(self, path: str | Path) -> Path:
        """Write the document. Raises UsageError if the file cannot be written."""
        target = Path(path)
        try:
            target.write_text(self.html(), encoding="utf-8")
        except OSError as fault:
            raise UsageError(f"the report {target} cannot be written: {fault.strerror}") from None
        return target
