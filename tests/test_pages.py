"""What the pages say can be done: their code runs as it stands, their commands exist, their links lead somewhere."""

from __future__ import annotations

import contextlib
import importlib
import re
from pathlib import Path
from unittest import mock

import pytest
import torch

from netdeconv.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_CODE = [page for page in PAGES if "```python\n" in page.read_text(encoding="utf-8")]

# Modules whose names the API page lists one by one, and those that it shows as they are.
LISTED = ("netdeconv", "netdeconv.nn", "netdeconv.surgery")
WHOLE = {f"netdeconv.{name}" for name in ("inspect", "functional", "zoo", "reference")}

# What the code of a page prints, in this order, or a file that it writes.
PRINTED = {
    "convert": (
        "21 layers whitened, 20 of 20 batch norms gone, 0 left as they are, 22 not concerned",
        "WhitenedConv2d(",
    ),
    "extend": ("norm                 test accuracy", "BatchNorm, no shift  ", "ND  "),
    "deploy": ("torch.nn.modules.conv.Conv2d", "conv1 0."),
}
WRITTEN = {"index": "resnet18.onnx", "deploy": "resnet18.onnx", "model-card": "fused.pt2"}

# Tables that the page on extending adds to; they are as before afterwards.
TABLES = ("netdeconv.lab.norms.NORMS", "netdeconv.lab.data.DATASETS")


def name_of(page: Path) -> str:
    return page.stem


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and the site make them, and of ``<a id="...">``."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}
    return slugs | set(re.findall(r'<a id="(.+?)">', text)) | set(re.findall(r"^::: (\S+)", text, re.MULTILINE))


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inside the ONNX exporter
def test_the_code_runs_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = blocks(page, "python")
    if any("export_onnx" in block for block in code):
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "page"}
    with contextlib.ExitStack() as kept:
        for table in TABLES if page.stem == "extend" else ():
            kept.enter_context(mock.patch.dict(table))
        for block in code:
            exec(compile(block, str(page), "exec", dont_inherit=True), names)
    printed = capsys.readouterr().out
    found = [printed.find(text) for text in PRINTED.get(page.stem, ())]
    assert -1 not in found and found == sorted(found), printed
    assert page.stem not in WRITTEN or (tmp_path / WRITTEN[page.stem]).stat().st_size > 0


def test_extending_takes_few_lines() -> None:
    assert len(code := blocks(ROOT / "docs" / "extend.md", "python")) >= 3
    assert max(block.count("\n") for block in code) < 40


def test_commands_of_the_pages_exist() -> None:
    known = {command.name for command in COMMANDS}
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    shell = "\n".join(block for page in PAGES for block in blocks(page, "sh"))
    commands = set(re.findall(r"^(?:srun )?netdeconv (\S+)", shell, re.MULTILINE))
    made = set(re.findall(r"^make (\S+)", shell, re.MULTILINE))
    assert len(commands) > 3 and len(made) > 2
    assert commands <= known
    assert made <= targets


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    dead = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = page if not path else page.parent / path
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


@pytest.mark.parametrize("module", LISTED)
def test_the_api_page_lists_every_public_name(module: str) -> None:
    listed = anchors(ROOT / "docs" / "api.md")
    names = set(importlib.import_module(module).__all__) - {"functional"}
    # The package itself exports some names of its parts.
    assert sorted(name for name in names if not {f"{module}.{name}", f"netdeconv.{name}"} & listed) == []


def test_the_api_page_shows_the_other_modules_whole() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^::: (\S+)\n    options: \{show_root_heading: false", page, re.MULTILINE)) == WHOLE
