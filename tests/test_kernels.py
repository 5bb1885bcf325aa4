"""The kernels that a GPU runs, under Triton's interpreter, which has to be chosen before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_kernels_compute_what_the_operators_do() -> None:
    pytest.importorskip("triton", reason="Triton comes with torch on Linux only")
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-cov"]
    found = subprocess.run(
        [*command, "interpreted_kernels.py"],
        cwd=here,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-2000:]
