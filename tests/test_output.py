"""What fit says, in a terminal and piped, and how it ends."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from netdeconv import cli
from terminals import environment, in_terminal, piped
from test_resume import checkpoint

pytest.importorskip("lightning")
pytest.importorskip("sklearn")

SETTINGS = ["--config=digits", "--width=0.25", "--trainer.accelerator=cpu", "--trainer.max_epochs=2"]
QUICK = [*SETTINGS, "--trainer.limit_train_batches=2"]


def test_a_terminal_shows_a_bar_with_the_loss_and_keeps_the_lines_that_a_log_gets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = in_terminal("fit", *SETTINGS, f"--out={tmp_path / 'terminal'}")
    assert shown.code == 0
    assert "loss=2." in shown.drawn
    assert "epoch 1/2: 100%" in shown.drawn
    assert "v_num" not in shown.drawn
    assert cli.main(["fit", *SETTINGS, f"--out={tmp_path / 'log'}"]) == 0
    log = capsys.readouterr().out.replace(str(tmp_path / "log"), str(tmp_path / "terminal")).splitlines()
    assert [line for line in shown.lines if line in log] == log
    assert not any("%|" in line for line in shown.lines)  # no bar is left
    assert {"loading Lightning ...", "reading the images of digits ..."} <= set(shown.lines) - set(log)
    first, one, two, last = log
    assert "small, norm nd, 1,250 parameters, digits" in first
    assert one.startswith("epoch 1/2: ") and two.startswith("epoch 2/2: ") and "train/loss" in two
    assert last == f"{tmp_path / 'terminal'}: 2 epochs; best validation/accuracy 0.93 in epoch 2"


def test_early_stopping_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stop = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=train/loss"]
    options = [*stop, "--trainer.callbacks.divergence_threshold=0.001", "--trainer.max_epochs=9"]
    for step in (2, 2):  # the same command again trains no further
        assert cli.main(["fit", *QUICK, *options, f"--out={tmp_path}"]) == 0
        *others, last = capsys.readouterr().out.splitlines()
        assert f"{tmp_path}: 1 epoch, stopped early (Divergence threshold reached: train/loss = " in last
        assert checkpoint(tmp_path)["global_step"] == step
    assert "finished before, after 1 epochs; nothing was done" in others[-1]


def test_a_run_that_ended_in_nan_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["fit", *QUICK, "--norm=bn", "--optimizer.lr=1e30", f"--out={tmp_path}"]
    for _ in range(2):  # and it is none when it is found finished
        assert cli.main(command) == 1
        error = capsys.readouterr().err
        assert error.startswith("netdeconv fit: the loss is NaN from epoch 1 on")
        assert error.count("\n") == 1
    with (tmp_path / "metrics.csv").open() as file:
        assert all(math.isnan(float(row["train/loss"])) for row in csv.DictReader(file))


def test_a_trial_of_single_batches_has_a_last_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", *SETTINGS, "--trainer.fast_dev_run=true", f"--out={tmp_path / 'run'}"]) == 0
    assert "single batches is done; nothing was written" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_compiling_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    assert cli.main(["fit", *QUICK, "--compile=true", f"--out={tmp_path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [i for i, line in enumerate(lines) if "is compiled in the first steps" in line] == [1]


def test_numbers_on_disk_are_without_the_noise_of_float32(tmp_path: Path) -> None:
    assert cli.main(["fit", *QUICK, f"--out={tmp_path}"]) == 0
    with (tmp_path / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            digits = row["validation/accuracy"].partition(".")[2]
            assert len(digits) <= 4, row  # of 400 images
            assert len(row["train/loss"].replace(".", "")) <= 9


def test_a_reader_that_goes_away_loses_no_epoch(tmp_path: Path) -> None:
    done = piped("fit", *QUICK, f"--out={tmp_path}", lines=1)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr
    assert f"The same command goes on from {tmp_path}" in done.stderr
    assert checkpoint(tmp_path)["global_step"] >= 2


@pytest.mark.parametrize("argv", [["--help"], ["fit", "--help"], ["recipes"]])
def test_a_closed_pipe_is_no_traceback(argv: list[str]) -> None:
    done = piped(*argv, lines=1)
    assert done.stdout
    assert done.stderr == ""
    assert done.returncode in (0, 141)  # a short text fits the pipe before its reader is gone


WARNS = """
import sys, warnings
from netdeconv import cli
def run(args):
    warnings.warn("two image files\\nleft out", UserWarning, stacklevel=1)
    return 0
cli.COMMANDS = (cli.Command("fit", "", None, run),)
sys.exit(cli.main(["fit"]))
"""


def test_a_warning_is_one_line_without_source() -> None:
    done = subprocess.run([sys.executable, "-c", WARNS], capture_output=True, text=True, env=environment(), check=True)
    assert done.stderr == "netdeconv fit: warning: two image files left out\n"


def test_a_warning_of_lightning_is_one_line_without_source(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "netdeconv", "fit", "--data=digits", "--optimizer.lr=-1", f"--out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    warning, mistake = done.stderr.splitlines()
    assert warning.startswith("netdeconv fit: warning: `max_epochs` was not set")
    assert mistake.startswith("netdeconv fit: Invalid learning rate: -1")
