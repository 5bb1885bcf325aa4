"""Stopping and going on: a run that was stopped ends where one that was not does."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import netdeconv
from netdeconv import cli

pytest.importorskip("lightning")
pytest.importorskip("sklearn")

from netdeconv.lab.tasks import Classification

SETTINGS = [
    "--config=digits", "--width=0.25", "--trainer.max_epochs=3", "--checkpoint.every_n_steps=3",
    "--trainer.accelerator=cpu", "--whitening.update_every=4",
]  # fmt: skip
STEPS = 48  # 16 in an epoch
MIDDLE = 25  # neither at an epoch's end nor at a checkpoint

# Runs the command line and kills itself in the training step of this number.
KILLED = """
import os, signal, sys
from netdeconv import cli
from netdeconv.lab.tasks import Classification
step = Classification.training_step
def training_step(self, batch, batch_idx):
    if self.trainer.global_step == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_idx)
Classification.training_step = training_step
sys.exit(cli.main(sys.argv[2:]))
"""


def rows(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def checkpoint(folder: Path, name: str = "last") -> Any:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def assert_same_end(folder: Path, uninterrupted: Path) -> None:
    """Everything is computed in the same order, so nothing may differ, in the last bit."""
    assert rows(folder) == rows(uninterrupted)
    ours, theirs = checkpoint(folder), checkpoint(uninterrupted)
    assert ours["global_step"] == theirs["global_step"] == STEPS
    for key, value in theirs["state_dict"].items():  # weights, whitening statistics and their counters
        assert torch.equal(ours["state_dict"][key], value), key
    assert ours["lr_schedulers"] == theirs["lr_schedulers"]
    momenta = [saved["optimizer_states"][0]["state"] for saved in (ours, theirs)]
    assert all(torch.equal(momenta[0][i]["momentum_buffer"], momenta[1][i]["momentum_buffer"]) for i in momenta[1])
    best = checkpoint(folder, "best"), checkpoint(uninterrupted, "best")
    assert best[0]["global_step"] == best[1]["global_step"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert cli.main(["fit", *SETTINGS, "--out", str(folder)]) == 0
    assert [row["step"] for row in rows(folder)] == [16, 32, 48]
    return folder


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, uninterrupted: Path) -> None:
    source = str(Path(netdeconv.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", KILLED, str(MIDDLE), "fit", *SETTINGS, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert checkpoint(tmp_path)["global_step"] == MIDDLE - 1  # a multiple of every_n_steps
    assert cli.main(["fit", *SETTINGS, "--out", str(tmp_path)]) == 0
    assert_same_end(tmp_path, uninterrupted)


@pytest.mark.slow
def test_several_processes_end_together_when_one_is_asked_to(tmp_path: Path) -> None:
    # Lightning's own handler talks to the other process from within the signal, and both wait for ever.
    script = tmp_path / "run.py"
    ask = KILLED.replace("== int(sys.argv[1])", "== 5 and self.global_rank == 1").replace("SIGKILL", "SIGTERM")
    script.write_text(ask.replace("sys.argv[2:]", "sys.argv[1:]"))
    out = tmp_path / "run"
    source = str(Path(netdeconv.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(script), "fit", *SETTINGS, "--trainer.devices=2", "--trainer.strategy=ddp"]
    done = subprocess.run(
        [*command, "--data.batch_size=32", f"--out={out}"],
        capture_output=True,
        text=True,
        env=env,
        check=False,
        timeout=300,
    )
    assert done.returncode == 143, done.stderr
    assert done.stderr.count(f"The same command goes on from {out}") == 1
    assert checkpoint(out)["global_step"] == 6  # that of the signal, between two checkpoints


def stop_at(monkeypatch: pytest.MonkeyPatch, where: str, call: int, stop: Callable[[], None]) -> None:
    """Let the task do something, once, in a call of this method."""
    calls = 0
    method = getattr(Classification, where)

    def stopped(self: Classification, *args: Any, **kwargs: Any) -> Tensor | None:
        nonlocal calls
        calls += 1
        if calls == call:
            stop()
        return method(self, *args, **kwargs)

    monkeypatch.setattr(Classification, where, stopped)


def interrupt() -> None:
    raise KeyboardInterrupt


def terminate() -> None:
    assert callable(signal.getsignal(signal.SIGTERM))  # else this would end the tests
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("where", "call", "stop", "code", "saved"),
    [
        ("training_step", MIDDLE + 2, terminate, 143, MIDDLE + 2),  # saves at once, between two checkpoints
        ("training_step", 17, interrupt, 130, 16),  # right after the first epoch
        ("validation_step", 3, interrupt, 130, 30),  # after the second epoch's steps, before its evaluation
    ],
    ids=["SIGTERM", "first step of an epoch", "evaluation"],
)
def test_a_stopped_run_goes_on(
    where: str,
    call: int,
    stop: Callable[[], None],
    code: int,
    saved: int,
    tmp_path: Path,
    uninterrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["fit", *SETTINGS, "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        stop_at(patch, where, call, stop)
        assert cli.main(command) == code
    assert f"The same command goes on from {tmp_path}" in capsys.readouterr().err
    assert checkpoint(tmp_path)["global_step"] == saved
    assert cli.main(command) == 0
    assert_same_end(tmp_path, uninterrupted)


def test_a_moved_run_remembers_its_best_checkpoint(
    tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    with monkeypatch.context() as patch:
        stop_at(patch, "training_step", MIDDLE, interrupt)
        assert cli.main(["fit", *SETTINGS, "--out", str(before)]) == 130
    before.rename(after)
    assert cli.main(["fit", *SETTINGS, "--out", str(after)]) == 0
    assert_same_end(after, uninterrupted)
    (best,) = (state for name, state in checkpoint(after)["callbacks"].items() if name.endswith("best"))
    assert Path(best["best_model_path"]) == after / "checkpoints" / "best.ckpt"


def test_gradient_accumulation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [*SETTINGS, "--trainer.accumulate_grad_batches=3", "--trainer.max_epochs=2"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert cli.main(["fit", *settings, "--out", str(whole)]) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, "training_step", 13, interrupt)
        assert cli.main(["fit", *settings, "--out", str(stopped)]) == 130
    assert checkpoint(stopped)["global_step"] == 3
    assert cli.main(["fit", *settings, "--out", str(stopped)]) == 0
    assert rows(stopped) == rows(whole)
