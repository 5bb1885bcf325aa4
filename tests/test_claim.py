"""Trainings in one run folder: one at a time, and none that leaves a folder without having taken a step."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout
from torch import Tensor

from netdeconv import cli
from terminals import environment
from test_fit import complaint
from test_resume import interrupt, stop_at, terminate

pytest.importorskip("lightning")
pytest.importorskip("sklearn")

from netdeconv.lab.tasks import Classification
from netdeconv.lab.training import claim

QUICK = [
    "--config=digits", "--width=0.25", "--trainer.accelerator=cpu", "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
]  # fmt: skip


def test_a_second_training_is_refused_while_the_first_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    tried: list[str] = []
    step = Classification.training_step

    def training_step(self: Classification, *args: Any) -> Tensor:
        with contextlib.suppress(Timeout), FileLock(out / claim.LOCK).acquire(timeout=0):
            tried.append("free")
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Classification, "training_step", training_step)
        assert cli.main(["fit", *QUICK, f"--out={out}"]) == 0
    assert tried == []
    monkeypatch.setattr(claim, "_PATIENCE", 0)
    before = sorted(out.rglob("*"))
    with FileLock(out / claim.LOCK):
        assert f"{out}: another netdeconv fit is training there" in complaint(capsys, "fit", *QUICK, f"--out={out}")
    assert sorted(out.rglob("*")) == before
    assert cli.main(["fit", *QUICK, f"--out={out}"]) == 0


@pytest.mark.parametrize("stop", [interrupt, terminate])
def test_what_is_stopped_before_its_first_step_leaves_no_folder(
    stop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, "on_train_start", 1, stop)
    cli.main(["fit", *QUICK, "--trainer.limit_train_batches=1", f"--out={tmp_path / 'runs' / 'a'}"])
    left = list(tmp_path.rglob("*.ckpt"))  # on SIGTERM the running step is done, and saved
    assert bool(left) == (stop is terminate) == (tmp_path / "runs").exists()


def test_what_fails_before_its_first_step_leaves_no_folder_and_nothing_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NETDECONV_DATA", str(tmp_path / "data"))
    missing = ["fit", "--config=mnist", "--network=small", "--trainer.accelerator=cpu"]
    complaint(capsys, *missing, f"--out={tmp_path / 'runs' / 'mnist'}")
    assert list(tmp_path.iterdir()) == []
    kept = tmp_path / "run" / "notes.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    complaint(capsys, *missing, f"--out={kept.parent}")
    assert list(kept.parent.iterdir()) == [kept]


def test_ctrl_c_while_libraries_are_loaded_is_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LAUNCHED, "fit", *QUICK, f"--out={tmp_path / 'run'}"]
    for seconds in (0.2, 0.7, 1.4):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
        time.sleep(seconds)
        os.kill(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert process.returncode in (130, -signal.SIGINT)
        assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


LAUNCHED = "import sys\nfrom netdeconv_launcher import main\nsys.exit(main())"
