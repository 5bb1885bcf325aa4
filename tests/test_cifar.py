"""CIFAR-10 on a small generated tree: loading, augmentation, seeds, finished runs, the table, mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from netdeconv.cli import main
from netdeconv.lab.data import CIFAR10Data
from netdeconv.lab.experiments import cifar_report, trials
from netdeconv.lab.experiments.experiment import Workspace
from netdeconv.lab.experiments.trials import Trial


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two images of one grey level for each of ten classes and parts, in the layout of folders."""
    for part in ("train", "test"):
        for label in range(10):
            folder = tmp_path / "data" / "cifar10-jpeg" / part / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", (32, 32), (20 * label, 100, 10 * index)).save(folder / f"{index}.png")
    monkeypatch.setenv("NETDECONV_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def test_images_and_labels_belong_together(root: Path) -> None:
    data = CIFAR10Data(root=root, batch_size=8, seed=3)
    data.setup()
    images, labels = data.parts["train"]
    assert images.shape == (20, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert torch.equal(images[:, 0, 5, 7] // 20, labels.to(torch.uint8))
    assert [len(batch[1]) for batch in data.train_dataloader()] == [8, 8, 4]
    (test, test_labels) = next(iter(data.val_dataloader()))
    assert torch.equal(test_labels, data.parts["test"][1])
    assert torch.equal(test, data.standardised(data.parts["test"][0]))


SMALL = ["--networks", "vgg11@0.03", "--bn-rates", "0.05", "0.1", "--rates", "0.1", "--batch-size", "8", "--quiet"]


def test_seeds_are_added_at_the_papers_rate_and_the_best(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = []

    def train(trial: Trial, data: Any, workspace: Workspace) -> dict[str, Any]:
        trained.append((trial.norm, trial.rate, trial.seed))
        accuracy = {("bn", 0.05): 0.6, ("bn", 0.1): 0.5, ("nd", 0.1): 0.7}[trial.norm, trial.rate] + trial.seed / 10
        return {**DONE, "curves": {"test/accuracy": [accuracy], "train/loss": [1.0]}}

    monkeypatch.setattr(trials, "train", train)
    assert main(["reproduce", "cifar", "--out", str(tmp_path), *SMALL, "--seeds", "2"]) == 0
    assert trained[:3] == [("bn", 0.05, 0), ("nd", 0.1, 0), ("bn", 0.1, 0)]
    assert sorted(trained[3:]) == [("bn", 0.05, 1), ("bn", 0.1, 1), ("nd", 0.1, 1)]
    shown = " ".join(capsys.readouterr().out.split())
    # by hand: 60 and 70, 50 and 60, 70 and 80 %
    assert "55.0 ± 7.1 % 65.0 ± 7.1 % (0.05) 75.0 ± 7.1 % (0.1)" in shown
    assert "ahead in 1 of 1 comparisons (+20.0 points)" in shown
    assert "ahead in 1 of 1 comparisons (+10.0 points)" in shown


def test_finished_runs_are_not_repeated(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["reproduce", "cifar", "--out", str(tmp_path), *SMALL]
    assert main(command) == 0
    first = json.loads((tmp_path / "cifar" / "result.json").read_text())
    assert [(run["norm"], run["rate"], run["steps"]) for run in first["result"]["runs"]] == [
        ("bn", 0.05, 3), ("nd", 0.1, 3), ("bn", 0.1, 3)
    ]  # fmt: skip
    monkeypatch.setattr(trials, "train", lambda *_: pytest.fail("trained again"))
    assert main(command) == 0
    assert json.loads((tmp_path / "cifar" / "result.json").read_text())["result"] == first["result"]


DONE = {"steps": 3, "seconds_per_step": 0.25, "parameters": 10, "diverged": False}
PLAIN = {"dataset": "cifar10", "network": "vgg11", "width": 0.03, "norm": "bn", "rate": 0.1}


@pytest.mark.parametrize(("norm", "block", "differentiable"), [("nd", 512, True), ("nd-paper", 512, True)])
def test_networks_of_the_norms(norm: str, block: int, differentiable: bool) -> None:
    made = trials.make_network(Trial(**{**PLAIN, "norm": norm}), CIFAR10Data(root=Path()))
    assert "BatchNorm2d" not in {type(module).__name__ for module in made.modules()}
    assert made.features[0].whitening.config.differentiable == (norm == "nd-paper")
    assert made.classifier.whitening.config.block_size == block
    assert made.classifier.whitening.config.differentiable == differentiable


def test_settings_of_whitening_reach_the_layers() -> None:
    trial = Trial(**{**PLAIN, "norm": "nd"}, whitening=(("num_iters", 8), ("eps", 1e-3)))
    config = trials.make_network(trial, CIFAR10Data(root=Path())).features[0].whitening.config
    assert (config.num_iters, config.eps) == (8, 1e-3)


def test_published_values_stand_beside() -> None:
    run = {**PLAIN, **DONE, "network": "vgg16", "epochs": 1, "seed": 0, "batch_size": 128, "weight_decay": 1e-3}
    curves = {"test/accuracy": [0.5], "train/loss": [None]}
    table, rates = cifar_report.present({"runs": [{**run, "curves": curves}]}).tables
    assert list(table.rows[0]) == ["VGG-16", "0.03", "CIFAR-10", "1", "50.0 %", "50.0 % (0.1)", "14.12 / 74.18 %"]
    assert rates.rows[0][-2] == "diverged"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--norms", "bm"], "argument --norms: invalid choice: 'bm'"),
        (["--rates", "0.1", "0.1"], "expected values of rates that differ"),
        (["--epochs", "0"], "expected epochs above 0, got 0"),
        (["--networks", "vgg11@0"], "expected a factor on the channels behind the @ of 'vgg11@0'"),
        (["--networks", "vgg12"], "expected networks out of"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str], message: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", "cifar", "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_missing_data_says_where_it_should_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NETDECONV_DATA", raising=False)
    assert main(["reproduce", "cifar", "--out", str(tmp_path)]) == 2
    assert "environment variable NETDECONV_DATA, got None" in capsys.readouterr().err
    monkeypatch.setenv("NETDECONV_DATA", str(tmp_path))
    assert main(["reproduce", "cifar", "--out", str(tmp_path)]) == 2
    assert "cifar10-jpeg, and found neither. Get it with" in capsys.readouterr().err
