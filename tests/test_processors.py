"""Trying other processors: which combinations are run, in what environment, and that a failure is one."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from variation import Variation

TOOL = Path(__file__).resolve().parents[1] / "tools" / "try_processors.py"
VALUES: dict[str, set[Any]] = {
    "onednn": {"SSE41", "AVX2", ""},
    "torch": {"default", ""},
    "threads": {1, 2},
    "nudge": {0.0, 1e-6},
}


@pytest.fixture
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("try_processors", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_pair_of_settings_and_every_seed_is_run(tool: Any) -> None:
    for one, other in itertools.combinations(VALUES, 2):
        found = {(getattr(run, one), getattr(run, other)) for run in tool.RUNS}
        assert found == set(itertools.product(VALUES[one], VALUES[other])), (one, other)
    assert {run.seed for run in tool.RUNS} == {0, 1, 2, 3, 4}


def test_a_run_holds_libraries_back_or_leaves_them_free(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("EMPTY", "")
    old = tool.environment(tool.Run("SSE41", "default", 2, 0, 0.0))
    assert (old["ONEDNN_MAX_CPU_ISA"], old["ATEN_CPU_CAPABILITY"]) == ("SSE41", "default")
    assert old["OMP_NUM_THREADS"] == old["MKL_NUM_THREADS"] == "2"
    free = tool.environment(tool.Run("", "", 1, 0, 0.0))
    assert "ONEDNN_MAX_CPU_ISA" not in free and "ATEN_CPU_CAPABILITY" not in free
    assert free["EMPTY"] == ""


@pytest.mark.parametrize(("seed", "failures"), [(2, 1), (7, 0)])
def test_one_failure_fails_and_is_shown(
    seed: int, failures: int, tool: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "import sys; print('why'); print('== a closing line =='); sys.exit(sys.argv[1] == 'True')"
    monkeypatch.setattr(tool, "command", lambda run, *_: [sys.executable, "-c", said, str(run.seed == seed)])
    assert tool.main([]) == failures
    shown = capsys.readouterr().out
    assert shown.count("  a closing line\n") == 6
    assert shown.count("why\n") == shown.count("FAILED") == failures
    assert shown.endswith(f"{6 - failures} of 6 runs passed\n")


def test_pytest_takes_the_options_and_fails_where_it_finds_no_test(tool: Any) -> None:
    line = tool.command(tool.Run("", "", 1, 0, 0.0), 1, ["-n0", "-knothing_is_called_so", str(Path(__file__))])
    assert subprocess.run(line, capture_output=True, check=False, cwd=tool.ROOT).returncode == 5


def test_inputs_are_moved_by_the_nudge_or_stay() -> None:
    x = torch.randn(1000)
    assert torch.equal(Variation().moved(x), x)
    moved = Variation(nudge=1e-3).moved(x) - x
    assert moved.std() == pytest.approx(1e-3, rel=0.1)  # of 1,000 draws: 2 % of spread
