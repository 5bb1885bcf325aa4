"""Tables as text and HTML, and pages that are one self-contained file."""

from __future__ import annotations

import base64
import dataclasses
import html
import struct
import unicodedata
from collections.abc import Sequence

from netdeconv.lab.page_style import SCRIPT, STYLE

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
        lines = [list(self.columns), *map(list, self.rows)]
        widths = [max(_width(line[i]) for line in lines) for i in range(len(self.columns))]

        def row(cells: Sequence[str]) -> str:
            first = cells[0] + " " * (widths[0] - _width(cells[0]))
            rest = [" " * (w - _width(c)) + c for c, w in zip(cells[1:], widths[1:], strict=True)]
            return "  ".join([first, *rest]).rstrip()

        rule = "  ".join("-" * w for w in widths)
        return "\n".join([row(self.columns), rule, *(row(cells) for cells in self.rows)])

    def to_markdown(self) -> str:
        """A Markdown table, without title and note; numbers to the right."""
        rule = ["---", *("--:" for _ in self.columns[1:])]
        lines = [self.columns, rule, *self.rows]
        return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)

    def to_html(self, *, words: bool = False) -> str:
        """An HTML table in a box that scrolls sideways, sorted by a click on a heading.

        ``words`` sets all columns to the left, and leaves the order as it is.
        """
        names = (html.escape(name) for name in self.columns)
        button = "{}" if words else '<button type="button">{}</button>'
        head = "".join(f'<th scope="col">{button.format(name) if name else name}</th>' for name in names)
        lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in self.rows)
        body = "\n".join(f"<tr>{line}</tr>" for line in lines)
        return (
            f'<div class="scroll" tabindex="0"><table class="{"words" if words else "sortable"}">\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
        )


class Page:
    """An HTML page that is built up from the top and needs no other file.

    Args:
        title: heading of the page and name of the window.
        wide: for tables of many columns: the page takes the whole width of a window of 1280 pixels.
    """

    def __init__(self, title: str, *, wide: bool = False) -> None:
        self.title = title
        self.wide = wide
        self._parts: list[str] = []

    def heading(self, text: str, *, anchor: str = "", below: bool = False) -> None:
        """Start a section, which links lead to by its anchor; or one ``below`` it."""
        level, place = (3 if below else 2), f' id="{html.escape(anchor)}"' if anchor else ""
        self._parts.append(f"<h{level}{place}>{html.escape(text)}</h{level}>")

    def contents(self, entries: Sequence[tuple[str, str, str]]) -> None:
        """A list of the sections: anchor, heading and a sentence of each."""
        lines = (
            f'<li><a href="#{html.escape(anchor)}">{html.escape(name)}</a><p>{html.escape(text)}</p></li>'
            for anchor, name, text in entries
        )
        self._parts.append('<ul class="contents">\n' + "\n".join(lines) + "\n</ul>")

    def verdict(self, text: str) -> None:
        """What came out, set apart."""
        self._parts.append(f'<p class="verdict">{html.escape(text)}</p>')

    def code(self, text: str, after: str) -> None:
        """A command, and plain text behind it."""
        self._parts.append(f'<p class="soft"><code>{html.escape(text)}</code>{html.escape(after)}</p>')

    def folded(self, summary: str, table: Table) -> None:
        """A table of words that opens with a click on its summary."""
        self._parts.append(
            f"<details><summary>{html.escape(summary)}</summary>\n{table.to_html(words=True)}\n</details>"
        )

    def paragraph(self, text: str, *, soft: bool = False) -> None:
        """A paragraph of plain text; ``soft`` sets it back."""
        kind = ' class="soft"' if soft else ""
        self._parts.append(f"<p{kind}>{html.escape(text)}</p>")

    def table(self, table: Table, *, words: bool = False) -> None:
        """A table, see :meth:`Table.to_html`."""
        self._parts.append(table.to_html(words=words))

    def picture(self, png: bytes, *, alt: str, caption: str) -> None:
        """A PNG picture, embedded, with a caption; on narrow screens a wide one scrolls sideways."""
        width, height = struct.unpack(">2I", png[16:24])  # of the header that every PNG begins with
        kind = ' class="wide"' if width > 1.6 * height else ""
        data = base64.b64encode(png).decode()
        self._parts.append(
            f'<figure><div class="scroll" tabindex="0"><img{kind} alt="{html.escape(alt)}" '
            f'width="{width}" height="{height}" src="data:image/png;base64,{data}"></div>\n'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )

    def to_html(self) -> str:
        """The whole page."""
        title, body = html.escape(self.title), "\n".join(self._parts)
        kind = ' class="wide"' if self.wide else ""
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<title>{title}</title>\n<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n</head>\n'
            f"<body>\n<main{kind}>\n<h1>{title}</h1>\n{body}\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
        )


def _width(text: str) -> int:
    """Columns that a text takes in a terminal."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
