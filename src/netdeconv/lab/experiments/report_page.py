"""The HTML page of ``netdeconv report``: every result in one file that needs no other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from netdeconv.lab.experiments.registry import load
from netdeconv.lab.experiments.results import Outcome, origin
from netdeconv.lab.report import Page, Table
from netdeconv.lab.store import write_whole

__all__ = ["write_page"]


def write_page(path: Path, found: Sequence[Outcome]) -> None:
    """Write the page; the figures' files must be there."""
    page = Page("The paper's claims, re-run")
    page.paragraph(
        "Network deconvolution (Ye et al., ICLR 2020) makes the claims below. Each was run again, at the size that the "
        "machine allows."
    )
    experiments = [load(str(outcome.record["experiment"])) for outcome in found]
    page.contents([(experiment.name, experiment.claim) for experiment in experiments])
    for outcome, experiment in zip(found, experiments, strict=True):
        page.heading(experiment.name, anchor=experiment.name)
        page.paragraph(f"Claim ({experiment.source}): {experiment.claim}")
        for table in outcome.presentation.tables:
            if table.title:
                page.heading(table.title, level=3)
            page.table(table)
            if table.note:
                page.paragraph(table.note, soft=True)
        for picture in outcome.presentation.figures:
            content = (outcome.folder / f"{picture.name}.png").read_bytes()
            page.picture(content, alt=picture.caption, caption=picture.caption)
        page.origin(*origin(outcome.record), _settings(outcome.record))
    write_whole(path, page.to_html().encode())


def _settings(record: Mapping[str, Any]) -> Table:
    rows = [[name, _shown(value)] for name, value in record["settings"].items()]
    for name in ("versions", "machine"):
        rows.append([name, ", ".join(f"{key} {value}" for key, value in record[name].items())])
    rows.append(["started, finished", f"{record['started']}, {record['finished']}"])
    return Table(["setting", "value"], rows)


def _shown(value: Any) -> str:
    return ", ".join(map(_shown, value)) if isinstance(value, (list, tuple)) else str(value)
