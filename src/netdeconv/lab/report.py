"""Tables for terminals, Markdown and HTML, and pages that are one self-contained file."""

from __future__ import annotations

import base64
import dataclasses
import struct
from collections.abc import Sequence
from typing import Any

__all__ = ["Page", "Table"]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text under a heading; the first column is for names, the others for numbers.

    Args:
        columns: headings.
        rows: as many cells each.
        title: what stands above the table.
        note: what stands below it: how the numbers came about.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"expected {len(self.columns)} cells like the heading, got {len(row)}: {list(row)!r}")

    def to_text(self) -> str:
        """Aligned columns for a terminal."""
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        form = "  ".join(f"{{:{'>' * (i > 0)}{width}}}" for i, width in enumerate(widths))
        lines = [self.columns, ["-" * width for width in widths], *self.rows]
        return "\n".join(form.format(*line).rstrip() for line in lines)

    def to_markdown(self) -> str:
        """A Markdown table, without title and note; numbers to the right."""
        rule = ["---", *("--:" for _ in self.columns[1:])]
        lines = [self.columns, rule, *self.rows]
        return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


class Page:
    """An HTML page that is built up from the top and needs no other file; ``templates/page.html`` is how it looks.

    Args:
        title: heading of the page and name of the window.
        wide: for tables of many columns: the page takes the whole width of a window of 1280 pixels.
    """

    def __init__(self, title: str, *, wide: bool = False) -> None:
        self.title = title
        self.wide = wide
        self._parts: list[tuple[str, dict[str, Any]]] = []

    def heading(self, text: str, *, anchor: str = "", level: int = 2) -> None:
        """Start a section, which links lead to by its anchor."""
        self._parts.append(("heading", {"text": text, "anchor": anchor, "level": level}))

    def contents(self, entries: Sequence[tuple[str, str]]) -> None:
        """A list of the sections: anchor, which is the heading, too, and a sentence of each."""
        self._parts.append(("contents", {"entries": entries}))

    def paragraph(self, text: str, *, soft: bool = False) -> None:
        """A paragraph of plain text; ``soft`` sets it back."""
        self._parts.append(("paragraph", {"text": text, "soft": soft}))

    def table(self, table: Table, *, words: bool = False) -> None:
        """A table that a click on a heading sorts; ``words`` sets all columns to the left, in the order given."""
        self._parts.append(("table", {"table": table, "words": words}))

    def picture(self, png: bytes, *, alt: str, caption: str) -> None:
        """A PNG picture, embedded, with a caption; on narrow screens a wide one scrolls sideways."""
        width, height = struct.unpack(">2I", png[16:24])  # of the header that every PNG begins with
        data = base64.b64encode(png).decode()
        shown = {"data": data, "width": width, "height": height, "alt": alt, "caption": caption}
        self._parts.append(("picture", shown))

    def origin(self, command: str, rest: str, settings: Table) -> None:
        """How numbers came about: a command, plain text behind it, and a table that opens with a click."""
        self._parts.append(("origin", {"command": command, "rest": rest, "settings": settings}))

    def to_html(self) -> str:
        """The whole page."""
        import jinja2  # here, as tables do without it

        templates = jinja2.Environment(
            loader=jinja2.PackageLoader("netdeconv.lab"), autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        page = templates.get_template("page.html")
        return page.render(title=self.title, wide=self.wide, parts=self._parts) + "\n"
