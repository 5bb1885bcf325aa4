"""The HTML page of ``netdeconv report``: every result in one file that needs no other."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from netdeconv.lab.experiments.registry import load
from netdeconv.lab.experiments.results import Outcome, setting_line
from netdeconv.lab.report import Page, Table
from netdeconv.lab.store import write_whole

__all__ = ["write_page"]

_SHORT = 60


def write_page(path: Path, found: Sequence[Outcome]) -> None:
    """Write the page; the figures' files must be there."""
    page = Page("The paper's claims, re-run")
    page.paragraph(
        "Network deconvolution (Ye et al., ICLR 2020) makes the claims below; each was run again, at the size that the "
        "machine allows. What came out stands first, the numbers with their settings follow."
    )
    page.contents(
        [(_name(outcome), _name(outcome), _first_sentence(outcome.presentation.verdict)) for outcome in found]
    )
    for outcome in found:
        _section(page, outcome)
    write_whole(path, page.to_html().encode())


def _section(page: Page, outcome: Outcome) -> None:
    experiment = load(_name(outcome))
    page.heading(experiment.name, anchor=experiment.name)
    page.paragraph(f"Claim ({experiment.source}): {experiment.claim}")
    page.verdict(outcome.presentation.verdict)
    for table in outcome.presentation.tables:
        if table.title:
            page.heading(table.title, below=True)
        page.table(table)
        if table.note:
            page.paragraph(table.note, soft=True)
    for picture in outcome.presentation.figures:
        content = (outcome.folder / f"{picture.name}.png").read_bytes()
        page.picture(content, alt=picture.caption, caption=picture.caption)
    command, rest = setting_line(outcome.record).split(";", 1)
    page.code(command, f";{rest}")
    page.folded("All settings and versions", _settings(outcome.record))


def _name(outcome: Outcome) -> str:
    return str(outcome.record["experiment"])


def _first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence; one in a number does not. After a short one the next, too."""
    first, *others = re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)
    return f"{first} {others[0]}" if others and len(first) < _SHORT else first


def _settings(record: Mapping[str, Any]) -> Table:
    rows = [[name, _shown(value)] for name, value in record["settings"].items()]
    for name in ("versions", "machine"):
        rows.append([name, ", ".join(f"{key} {value}" for key, value in record[name].items())])
    rows.append(["started, finished", f"{record['started']}, {record['finished']}"])
    return Table(["setting", "value"], rows)


def _shown(value: Any) -> str:
    return ", ".join(map(_shown, value)) if isinstance(value, (list, tuple)) else str(value)
