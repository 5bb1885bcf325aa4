"""The kernels that a GPU runs, under Triton's interpreter, which has to be chosen before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from netdeconv.functional import on_gpu

HERE, CPU = Path(__file__).parent, torch.device("cpu")


def test_the_kernels_compute_what_the_operators_do(request: pytest.FixtureRequest) -> None:
    pytest.importorskip("triton", reason="Triton comes with torch on Linux only")
    measured = request.config.pluginmanager.hasplugin("_cov")
    # What is covered there is written beside what the other processes write, and joined with it.
    coverage = ["-m", "coverage", "run", "--parallel-mode", f"--rcfile={HERE.parent / 'pyproject.toml'}"]
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-cov", "interpreted_kernels.py"]
    found = subprocess.run(
        [sys.executable, *(coverage if measured else []), *tests],
        cwd=HERE,
        env={**os.environ, "TRITON_INTERPRET": "1", "COVERAGE_FILE": str(HERE.parent / ".coverage")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-2000:]


@pytest.fixture
def fresh() -> Iterator[None]:
    on_gpu.available_kernels.cache_clear()
    yield
    on_gpu.available_kernels.cache_clear()


def test_they_can_be_switched_off(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETDECONV_KERNELS", "0")
    assert on_gpu.available_kernels(CPU) is None


def test_without_triton_there_are_none(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "netdeconv.functional.kernels", raising=False)
    assert on_gpu.available_kernels(CPU) is None


def test_a_triton_that_cannot_launch_is_reported_once(fresh: None) -> None:
    pytest.importorskip("triton", reason="Triton comes with torch on Linux only")
    with pytest.warns(UserWarning, match="expected Triton to run on cpu, got"):  # which it does not, uninterpreted
        assert on_gpu.available_kernels(CPU) is None
    assert on_gpu.available_kernels(CPU) is None


def test_a_cpu_has_none() -> None:
    assert on_gpu.kernels_for(torch.randn(2, 3, 4, 4)) is None
