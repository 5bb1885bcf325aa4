"""CIFAR-10 on a small generated tree: loading, augmentation, finished runs, the table, mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from netdeconv.cli import main
from netdeconv.lab.data import CIFAR10Data
from netdeconv.lab.experiments import cifar
from netdeconv.lab.experiments.cifar_settings import CifarSettings


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


SMALL: dict[str, Any] = {"width": 0.03, "seeds": 1, "rates": (0.05,), "batch_size": 8}


def test_finished_runs_are_not_repeated(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = CifarSettings(**SMALL)
    first = cifar.run_cifar(tmp_path / "out", settings, show=False)
    assert [(entry["method"], entry["steps"]) for entry in first] == [("bn", 3), ("nd", 3), ("paper", 3)]
    monkeypatch.setattr(cifar, "_train", lambda *_: pytest.fail("trained again"))
    again = cifar.run_cifar(tmp_path / "out", settings, show=False)
    assert again == first
    written = json.loads((tmp_path / "out" / "cifar.json").read_text())
    assert [run["curves"] for run in written["runs"]] == [run["curves"] for run in first]


def test_networks_of_the_methods() -> None:
    settings = CifarSettings(**SMALL)
    kinds = {method: {type(m).__name__ for m in cifar.network(method, settings).modules()} for method in cifar.METHODS}
    assert "BatchNorm2d" in kinds["bn"]
    assert "BatchNorm2d" not in kinds["nd"] | kinds["paper"]
    published = cifar.network("paper", settings)
    assert published.features[0].whitening.config.block_size == 64
    assert published.classifier.whitening.config.block_size == 512
    assert published.classifier.whitening.config.differentiable


def test_table_by_hand() -> None:
    def run(accuracy: float) -> dict[str, Any]:
        curves = {"test/accuracy": [0.1, accuracy], "train/loss": [2.0, 1.0]}
        return {"method": "bn", "rate": 0.1, "curves": curves, "seconds_per_step": 0.25}

    assert cifar.table([run(0.5), run(0.6)]).splitlines()[-1] == (
        "| BatchNorm | 0.1 | 2 | 55.00 ± 7.07 % | 1.000 | 0.250 |"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "bm"], "expected methods out of bn, nd, paper, got ['bm']"),
        (["--rates", "0.1", "0.1"], "expected learning rates that differ"),
        (["--epochs", "0"], "expected epochs of at least 1, got 0"),
        (["--width", "0"], "expected a width above 0"),
        (["--network", "vgg12"], "expected a network out of"),
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
