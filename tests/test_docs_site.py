"""The documentation as a site: it builds without a warning, and reads in a browser without a network."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import BROWSER, WIDTHS, dumped

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(page.with_suffix(".html").name for page in (ROOT / "docs").glob("*.md"))
LEGIBLE = 280  # pixels that a picture is at least wide, in a window of 400

pytestmark = pytest.mark.slow

CATCH = """<script>window.errors = [];
window.onerror = function (text) { window.errors.push(String(text)); };
window.onunhandledrejection = function (event) { window.errors.push(String(event.reason)); };</script>"""

# Opens the pages one after the other in a frame, each half a second after it has loaded, and writes down what it saw.
FRAME = """<!doctype html><body><pre id="found"></pre>
<iframe style="border: 0; width: WIDTHpx; height: 3000px"></iframe>
<script>
const pages = PAGES, seen = {}, frame = document.querySelector("iframe");
function next() {
  if (pages.length) { frame.src = pages.shift(); return; }
  document.getElementById("found").textContent = JSON.stringify(seen);
}
frame.addEventListener("load", () => setTimeout(function () {
  const inside = frame.contentWindow, page = inside.document;
  seen[inside.location.pathname.slice(1)] = {
    errors: inside.errors, width: inside.innerWidth, page: page.documentElement.scrollWidth,
    title: page.querySelector("h1").textContent,
    pictures: Array.from(page.querySelectorAll("article img"),
                         image => [image.complete && image.naturalWidth > 0, image.clientWidth, image.alt]),
    outside: inside.performance.getEntriesByType("resource").map(one => one.name)
                   .filter(name => !name.startsWith("data:") && !name.startsWith(location.origin)),
  };
  next();
}, 500));
next();
</script></body>"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    missing = [name for name in ("mkdocs", "material", "mkdocstrings_handlers") if not importlib.util.find_spec(name)]
    if missing:
        pytest.skip("needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the site is served; its pages collect their errors."""
    for page in site.glob("*.html"):
        page.write_text(page.read_text(encoding="utf-8").replace("<head>", f"<head>{CATCH}", 1), encoding="utf-8")
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_every_page_is_built(site: Path) -> None:
    assert set(PAGES) <= {page.name for page in site.glob("*.html")}


@pytest.mark.parametrize("width", WIDTHS)
def test_every_page_reads_in_a_browser(width: int, site: Path, address: str, tmp_path: Path) -> None:
    if BROWSER is None:
        pytest.skip("needs chromium: there is none on the path")
    frame = FRAME.replace("WIDTH", str(width)).replace("PAGES", json.dumps(PAGES))
    (site / "frame.html").write_text(frame, encoding="utf-8")
    seen = dumped(f"{address}/frame.html", tmp_path / "profile")
    assert sorted(seen) == PAGES
    for name, page in seen.items():
        assert page["errors"] == [] and page["outside"] == [], name
        assert page["page"] <= page["width"] == width, name
        for complete, wide, alt in page["pictures"]:
            assert complete and alt and wide >= LEGIBLE, f"{name}: {alt}"
    assert sum(len(page["pictures"]) for page in seen.values()) > 10
