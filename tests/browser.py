"""Pages in Chromium: where it is, and the document as it is after the scripts have run."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (1280, 400)  # of a frame in a page: a window of Chromium is never narrower than 500 pixels
SECONDS = 120  # a browser on a busy machine; it takes two or three


def dumped(url: str, profile: Path) -> Any:
    """What a page has written, as JSON, into its ``<pre id="found">``."""
    assert BROWSER is not None
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}",
        "--window-size=1400,3200", "--virtual-time-budget=20000", "--dump-dom", url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found and found[1], f"the page told nothing: {done.stderr[-500:]}"
    return json.loads(html.unescape(found[1]))
