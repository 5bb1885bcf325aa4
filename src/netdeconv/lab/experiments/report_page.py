"""The HTML page of ``netdeconv report``: every result in one file that needs no other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from netdeconv.lab.experiments.registry import load
from netdeconv.lab.experiments.results import Outcome, setting_line
from netdeconv.lab.report import Page
from netdeconv.lab.store import write_whole

__all__ = ["write_page"]


def write_page(path: Path, found: Sequence[Outcome]) -> None:
    """Write the page; the figures' files must be there."""
    page = Page("The paper's claims, re-run")
    for outcome in found:
        experiment = load(outcome.record["experiment"])
        page.heading(experiment.name)
        page.paragraph(f"Claim ({experiment.source}): {experiment.claim}")
        page.paragraph(outcome.presentation.verdict)
        for table in outcome.presentation.tables:
            page.paragraph(table.title)
            page.table(table)
            page.paragraph(table.note, soft=True)
        for picture in outcome.presentation.figures:
            content = (outcome.folder / f"{picture.name}.png").read_bytes()
            page.picture(content, alt=picture.caption, caption=picture.caption)
        page.paragraph(setting_line(outcome.record), soft=True)
    write_whole(path, page.to_html().encode())
