"""How pages look, and how their tables are sorted: the style sheet and the script that every page carries."""

from __future__ import annotations

__all__ = ["SCRIPT", "STYLE"]

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --paper: #fff; --line: #d5dae0; --shade: #f5f7f9;
  --mark: #0b5cad; --tint: #eef5fc; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --soft: #9aa5b1; --paper: #14181d; --line: #343c45; --shade: #1c2229;
    --mark: #7ab8f5; --tint: #17273a; }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: break-word;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 1.5rem 1.1rem 3rem; }
main.wide { max-width: 80rem; }
main.wide th, main.wide td { padding: 0.25rem 0.4rem; font-size: 0.84rem; }
main.wide table.sortable th:first-child, main.wide table.sortable td:first-child { min-width: 6rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.4rem 0 0.6rem; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 3rem 0 0.5rem; scroll-margin-top: 0.8rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 0.3rem; }
p { margin: 0.5rem 0; max-width: 46rem; }
a { color: var(--mark); text-underline-offset: 0.15em; }
code { font: 0.88em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  overflow-wrap: anywhere; }
.soft, figcaption { color: var(--soft); }
.soft, figcaption, details { font-size: 0.92rem; }
.verdict { border-left: 4px solid var(--mark); background: var(--tint); padding: 0.6rem 0.9rem; max-width: 48rem; }
.contents { list-style: none; margin: 1rem 0 0; padding: 0; }
.contents li { padding: 0.7rem 0; border-top: 1px solid var(--line); max-width: 48rem; }
.contents a { font-weight: 600; }
.contents p { margin: 0.15rem 0 0; }
.scroll { overflow-x: auto; max-width: 100%; }
.scroll:focus-visible, button:focus-visible, summary:focus-visible { outline: 2px solid var(--mark);
  outline-offset: 2px; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; margin: 0.6rem 0; }
th, td { padding: 0.3rem 0.8rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0.4rem; }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; font-weight: 600; }
tbody tr:nth-child(even) td { background: var(--shade); }
td:not(:first-child) { white-space: nowrap; }
table.sortable th:first-child, table.sortable td:first-child { position: sticky; left: 0; background: var(--paper);
  min-width: 10.5rem; max-width: 22rem; }
table.sortable tbody tr:nth-child(even) td:first-child { background: var(--shade); }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button::after { content: "\\a0\\2195"; color: var(--soft); opacity: 0.6; }
th[aria-sort=ascending] button::after { content: "\\a0\\2191"; color: var(--mark); opacity: 1; }
th[aria-sort=descending] button::after { content: "\\a0\\2193"; color: var(--mark); opacity: 1; }
th button:hover { color: var(--mark); }
table.words td:not(:first-child) { white-space: normal; text-align: left; overflow-wrap: anywhere; }
table.words th { text-align: left; }
figure { margin: 1rem 0 0; }
figure img { display: block; width: auto; max-width: 100%; height: auto; background: #fff; padding: 0.5rem;
  border: 1px solid var(--line); border-radius: 6px; }
figcaption { margin: 0.5rem 0 0; max-width: 46rem; }
details { margin: 0.8rem 0 0; }
summary { cursor: pointer; color: var(--soft); }
@media (max-width: 640px) {
  main { padding: 0.8rem 0.7rem 2rem; }
  h1 { font-size: 1.35rem; }
  h2 { font-size: 1.12rem; margin-top: 2.2rem; }
  th, td { padding: 0.28rem 0.4rem; font-size: 0.86rem; }
  table.sortable th:first-child, table.sortable td:first-child { min-width: 6rem; max-width: 9.5rem; }
  figure .scroll img.wide { width: 46rem; max-width: none; }
}
@media print { th button::after { content: ""; } .scroll { overflow: visible; } }
"""

# A click on a heading sorts by its column: upwards, downwards, then as it was. Cells are compared by the number that
# they begin with, where at least half of a column's do, others as words. What has no number comes last either way.
SCRIPT = """
"use strict";
(function () {
  const number = function (text) {
    const plain = text.replace(/,(?=\\d{3})/g, "");
    const found = plain.match(/^[^\\d\\p{L}]*?([-+\\u2212]?\\d+(?:\\.\\d+)?(?:e[-+]?\\d+)?)/iu);
    return found ? Number(found[1].replace("\\u2212", "-")) : NaN;
  };
  document.querySelectorAll("table.sortable").forEach(function (table) {
    const body = table.tBodies[0], rows = Array.from(body.rows), heads = Array.from(table.tHead.rows[0].cells);
    heads.forEach(function (head, column) {
      const text = function (row) { return row.cells[column].textContent.trim(); };
      const numbers = rows.filter(function (row) { return !Number.isNaN(number(text(row))); });
      const numeric = numbers.length * 2 >= rows.length;
      const before = function (one, other) {
        if (!numeric) return text(one).localeCompare(text(other), undefined, { numeric: true });
        return number(text(one)) - number(text(other));
      };
      head.querySelector("button").addEventListener("click", function () {
        const order = { none: "ascending", ascending: "descending", descending: "none" }[head.ariaSort || "none"];
        heads.forEach(function (other) { other.removeAttribute("aria-sort"); });
        let sorted = rows.slice();
        if (order !== "none") {
          head.setAttribute("aria-sort", order);
          const sign = order === "ascending" ? 1 : -1;
          const absent = sorted.filter(function (row) { return numeric && Number.isNaN(number(text(row))); });
          sorted = sorted.filter(function (row) { return !absent.includes(row); });
          sorted.sort(function (one, other) { return sign * before(one, other); });
          sorted = sorted.concat(absent);
        }
        body.append(...sorted);
      });
    });
  });
})();
"""
