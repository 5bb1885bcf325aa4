"""Tables as text and HTML, and pages that are one self-contained file."""

from __future__ import annotations

import base64
import dataclasses
import html
import unicodedata
from collections.abc import Sequence

__all__ = ["Page", "Table"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --paper: #fff; --line: #d5dae0; --shade: #f5f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --soft: #9aa5b1; --paper: #14181d; --line: #343c45; --shade: #1c2229; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1.1rem 3rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.4rem 0 0.6rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 0.5rem; }
p { margin: 0.5rem 0; max-width: 46rem; }
.soft, figcaption { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 0.6rem 0; }
th, td { padding: 0.3rem 0.8rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0.2rem; }
thead th { border-bottom: 2px solid var(--line); }
tbody tr:nth-child(even) { background: var(--shade); }
td:not(:first-child) { white-space: nowrap; }
table.words td:not(:first-child) { white-space: normal; text-align: left;
  overflow-wrap: anywhere; }
figure { margin: 0.6rem 0 0; }
figure img { display: block; width: 100%; height: auto; background: #fff; padding: 0.5rem;
  border: 1px solid var(--line); border-radius: 6px; }
figcaption { margin: 0.5rem 0 0; max-width: 46rem; }
@media (max-width: 640px) {
  main { padding: 0.8rem 0.7rem 2rem; }
  h1 { font-size: 1.35rem; }
  th, td { padding: 0.28rem 0.4rem; font-size: 0.88rem; }
  figure .scroll img { width: 46rem; max-width: none; }
}
"""


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
        """An HTML table in a box that scrolls sideways; ``words`` sets all columns to the left."""
        head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in self.columns)
        lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in self.rows)
        body = "\n".join(f"<tr>{line}</tr>" for line in lines)
        kind = ' class="words"' if words else ""
        return (
            f'<div class="scroll" tabindex="0"><table{kind}>\n<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{body}\n</tbody></table></div>"
        )


class Page:
    """An HTML page that is built up from the top and needs no other file.

    Args:
        title: heading of the page and name of the window.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []

    def heading(self, text: str) -> None:
        """Start a section."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str, *, soft: bool = False) -> None:
        """A paragraph of plain text; ``soft`` sets it back."""
        kind = ' class="soft"' if soft else ""
        self._parts.append(f"<p{kind}>{html.escape(text)}</p>")

    def table(self, table: Table, *, words: bool = False) -> None:
        """A table, see :meth:`Table.to_html`."""
        self._parts.append(table.to_html(words=words))

    def picture(self, png: bytes, *, alt: str, caption: str) -> None:
        """A PNG picture, embedded, with a caption; on narrow screens it scrolls sideways."""
        data = base64.b64encode(png).decode()
        self._parts.append(
            f'<figure><div class="scroll" tabindex="0"><img alt="{html.escape(alt)}" '
            f'src="data:image/png;base64,{data}"></div>\n'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )

    def to_html(self) -> str:
        """The whole page."""
        title, body = html.escape(self.title), "\n".join(self._parts)
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<title>{title}</title>\n<link rel="icon" href="data:,">\n<style>{_STYLE}</style>\n</head>\n'
            f"<body>\n<main>\n<h1>{title}</h1>\n{body}\n</main>\n</body>\n</html>\n"
        )


def _width(text: str) -> int:
    """Columns that a text takes in a terminal."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
