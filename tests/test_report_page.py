"""The page of results in a browser: no script errors, every picture there, tables that sort, nothing too wide."""

from __future__ import annotations

import dataclasses
import html
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from browser import BROWSER, WIDTHS, dumped
from netdeconv.lab.experiments import report_page
from netdeconv.lab.experiments.experiment import SIZES, Experiment, Picture, Presentation
from netdeconv.lab.experiments.report_page import write_page
from netdeconv.lab.experiments.results import Outcome, draw
from netdeconv.lab.report import Table

# Written into a copy of the page. It collects errors, clicks every heading of every table once, twice and three times,
# and tells the page around it what it saw.
PROBE = """
<script>
window.addEventListener("load", function () {
  const order = function (table) { return Array.from(table.tBodies[0].rows, row => row.cells[0].textContent); };
  const tables = Array.from(document.querySelectorAll("table.sortable"), function (table) {
    const columns = Array.from(table.querySelectorAll("th button"), function (button) {
      const orders = [order(table)];
      for (let click = 0; click < 3; click++) { button.click(); orders.push(order(table)); }
      return { name: button.textContent, orders: orders };
    });
    const box = table.parentElement;
    return { columns: columns, scrolls: box.scrollWidth > box.clientWidth };
  });
  parent.postMessage({
    errors: window.errors, tables: tables, width: innerWidth,
    page: document.documentElement.scrollWidth,
    pictures: Array.from(document.images, image => [image.complete, image.naturalWidth, image.alt]),
    links: Array.from(document.querySelectorAll("a"), link => !!document.getElementById(link.hash.slice(1))),
    outside: performance.getEntriesByType("resource").map(one => one.name).filter(name => !name.startsWith("data:")),
    claim: document.querySelector("h2 + p").textContent,
    injected: document.querySelectorAll("b").length,
  }, "*");
});
</script>
"""
CATCH = "<script>window.errors = []; window.onerror = function (text) { window.errors.push(String(text)); };</script>"

FRAME = """<!doctype html><body><pre id="found"></pre><script>
window.addEventListener("message", function (event) {
  document.getElementById("found").textContent = JSON.stringify(event.data);
});
</script><iframe src="page.html" style="border: 0; width: WIDTHpx; height: 3000px"></iframe></body>"""


def picture(figure: Figure) -> None:
    figure.subplots().plot([0, 1, 4])


NUMBERS = Table(
    ["layer <b>of</b> a network", "accuracy", "loss", "rate", "verdict", "a column with a long name", "and another"],
    [
        ["conv10", "9.5 ± 0.1 %", "1,200", "1e-05", "good", "0.241 → 0.5", "x" * 12],
        ["conv2", "10.5 %", "–", "0.1", "bad", "0.9 → 0.1", "x" * 12],
        ["conv1", "diverged", "950", "0.02", "fair", "–", "x" * 12],
        ["conv3", "−1 %", "10", "1", "good & <i>cheap</i>", "0.3", "x" * 12],
    ],
    title="Numbers <b>of</b> all kinds",
    note="A note.",
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with one finished and one unfinished experiment."""
    folder = tmp_path_factory.mktemp("report")
    patch = pytest.MonkeyPatch()
    found = []
    for name, complete in (("first", True), ("second", False)):
        figures = [Picture(f"{name}-{i}", f'Caption {i} of "{name}".', picture) for i in range(2)]
        tables = [NUMBERS, dataclasses.replace(NUMBERS, title="", note="")]
        presentation = Presentation(tables, figures)
        record = {
            "experiment": name,
            "command": f"netdeconv reproduce {name} --size small",
            "settings": {"rates": [0.1, 0.2], "network": "a" * 80},
            "machine": {"processor": "CPU", "threads": 1, "cores": 2},
            "versions": {"torch": "2.0"},
            "minutes": 1.25,
            "code": "abc",
            "started": "2026-01-01T00:00:00",
            "finished": "2026-01-01T00:02:00",
            "complete": complete,
        }
        found.append(Outcome(record, presentation, folder / name))
        draw(found[-1])

    def load(name: str) -> Experiment:
        return Experiment(
            name=name, claim="Claims <b>are</b> escaped.", source="page 1", sizes=dict.fromkeys(SIZES, None),
            run=lambda settings, workspace: {}, present=lambda result: found[0].presentation,
        )  # fmt: skip

    with patch.context() as context:
        context.setattr(report_page, "load", load)
        write_page(folder / "report.html", found)
    return folder / "report.html"


def test_a_table_aligns() -> None:
    table = Table(["", "a | b"], [["x", "1 ± 2"], ["longer", "3"]])
    assert table.to_text().splitlines() == ["        a | b", "------  -----", "x       1 ± 2", "longer      3"]
    assert table.to_markdown().splitlines() == ["|  | a \\| b |", "| --- | --: |", "| x | 1 ± 2 |", "| longer | 3 |"]
    with pytest.raises(ValueError, match="expected 2 cells"):
        Table(["a", "b"], [["1"]])


def test_the_page_says_how_the_numbers_came_about(page: Path) -> None:
    text = page.read_text()
    assert '<a href="#second">second</a><p>Claims &lt;b&gt;are&lt;/b&gt; escaped.</p>' in text
    assert "<code>netdeconv reproduce first --size small</code>; CPU, 1 of 2 cores, torch 2.0; 1.2 minutes" in text
    assert text.count("Not finished") == 1
    assert text.count("<h3>") == 2 and "></h3>" not in text and "></p>" not in text
    assert "0.1, 0.2" in text
    assert html.escape(NUMBERS.rows[3][4]) in text and "<b>" not in text
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", text)


@pytest.fixture(scope="module", params=WIDTHS)
def seen(request: pytest.FixtureRequest, page: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the probe found at this width."""
    if BROWSER is None:
        pytest.skip("needs chromium: there is none on the path")
    folder = tmp_path_factory.mktemp("browser")
    text = page.read_text().replace("<head>", f"<head>{CATCH}", 1).replace("</body>", f"{PROBE}</body>", 1)
    (folder / "page.html").write_text(text)
    (folder / "frame.html").write_text(FRAME.replace("WIDTH", str(request.param)))
    return {**dumped((folder / "frame.html").as_uri(), folder / "profile"), "asked": request.param}


def test_scripts_run_without_errors_and_load_nothing(seen: dict[str, Any]) -> None:
    assert seen["width"] == seen["asked"]
    assert seen["errors"] == []
    assert seen["outside"] == []
    assert seen["injected"] == 0 and seen["claim"] == "Claim (page 1): Claims <b>are</b> escaped."
    assert seen["links"] == [True, True]


def test_every_picture_is_there(seen: dict[str, Any]) -> None:
    assert len(seen["pictures"]) == 4
    assert all(complete and width > 100 for complete, width, _ in seen["pictures"])
    assert seen["pictures"][0][2] == 'Caption 0 of "first".'


def test_the_page_is_not_wider_than_its_window(seen: dict[str, Any]) -> None:
    assert seen["page"] <= seen["asked"]
    assert seen["tables"][0]["scrolls"] is (seen["asked"] == 400)


def test_a_click_sorts_and_the_third_restores(seen: dict[str, Any]) -> None:
    written = [row[0] for row in NUMBERS.rows]
    assert len(seen["tables"]) == 4
    expected = {
        "layer <b>of</b> a network": ["conv1", "conv2", "conv3", "conv10"],
        "accuracy": ["conv3", "conv10", "conv2", "conv1"],
        "loss": ["conv3", "conv1", "conv10", "conv2"],
        "rate": ["conv10", "conv1", "conv2", "conv3"],
        "verdict": ["conv2", "conv1", "conv10", "conv3"],
        "a column with a long name": ["conv10", "conv3", "conv2", "conv1"],
    }
    absent = {"accuracy": "conv1", "loss": "conv2", "a column with a long name": "conv1"}
    for column in seen["tables"][0]["columns"]:
        before, up, down, after = column["orders"]
        assert before == after == written
        if column["name"] in expected:
            order = expected[column["name"]]
            last = [absent[column["name"]]] if column["name"] in absent else []
            assert up == order, column["name"]
            assert down == [*reversed([name for name in order if name not in last]), *last], column["name"]
