"""A run folder, or a checkpoint of it wherever it lies, is enough for validate, test, inspect and export."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from netdeconv import ConfigError, cli
from netdeconv.lab.saved import find_saved
from test_fit import complaint

pytest.importorskip("lightning")
pytest.importorskip("sklearn")

SETTINGS = [
    "--config=digits", "--width=0.25", "--trainer.accelerator=cpu", "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=4", "--whitening.block_size=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert cli.main(["fit", *SETTINGS, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(trained, tmp_path / "run")


def ways(run: Path, elsewhere: Path) -> list[Path]:
    """The ways to name the best checkpoint; the last one is far from the folder it was trained in."""
    best = run / "checkpoints" / "best.ckpt"
    return [run, best, Path(shutil.copy(best, elsewhere / "moved.ckpt"))]


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluation_takes_a_folder_or_a_checkpoint(
    command: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    before = sorted(run.rglob("*"))
    for way in ways(run, tmp_path):
        assert cli.main([command, str(way), "--trainer.accelerator=cpu"]) == 0
        printed = capsys.readouterr()
        found[way] = printed.out
        assert f"{way}" in printed.err and "epoch 2" in printed.err
        assert "test/accuracy 0." in printed.out
    assert len(set(found.values())) == 1
    assert sorted(run.rglob("*")) == before  # nothing is logged into the folder
    old = cli.main([command, "--out", str(run), "--trainer.accelerator=cpu"])
    assert (old, capsys.readouterr().out) == (0, found[run])
    moved = tmp_path / "moved.ckpt"
    for words in (["--out", str(moved)], ["--ckpt_path", str(moved)], [str(moved), *SETTINGS]):
        assert cli.main([command, *words, "--trainer.accelerator=cpu"]) == 0
        assert capsys.readouterr().out == found[run]
    assert "expected one run folder or checkpoint, got" in complaint(capsys, command, str(run), f"--out={run}")
    last = run / "checkpoints" / "last.ckpt"
    assert cli.main([command, str(run), "--ckpt_path=last", "--trainer.accelerator=cpu"]) == 0
    assert f"{last}" in capsys.readouterr().err


def test_inspect_takes_a_folder_or_a_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = []
    for way in ways(run, tmp_path):
        assert cli.main(["inspect", str(way), "--images", "32", "--out", str(tmp_path / "page")]) == 0
        first, _, table = capsys.readouterr().out.partition("\n")
        assert ".ckpt, epoch 2; 32 images of digits, 1x8x8" in first
        tables.append(table)
    assert len(set(tables)) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inside the exporters
def test_export_takes_a_folder_or_a_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    out = tmp_path / "small.onnx"
    for way in ways(run, tmp_path):
        assert cli.main(["export", str(way), str(out)]) == 0
        assert "small of" in (line := capsys.readouterr().out) and ".ckpt, epoch 2" in line


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("norm", ["gn", "ln", "in", "none", "nd-authors", "iternorm", "dbp", "swbn", "gn+ws"])
def test_export_takes_every_norm_and_one_channel(norm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    network = ["--config=digits", "--network=vgg11", "--width=0.0625", "--data.image_size=32", f"--norm={norm}"]
    options = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"]
    run = tmp_path / "run"
    assert cli.main(["fit", *network, *options, "--trainer.accelerator=cpu", f"--out={run}"]) == 0
    assert cli.main(["export", str(run), str(tmp_path / "net.onnx")]) == 0
    assert f"vgg11 of {run}" in capsys.readouterr().out


def test_a_damaged_checkpoint_names_the_whole_one_beside_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last, best = (run / "checkpoints" / f"{name}.ckpt" for name in ("last", "best"))
    whole = last.read_bytes()
    last.write_bytes(whole[:-2000])
    line = complaint(capsys, "fit", f"--out={run}")
    assert f"{last}: expected a file of torch.save" in line
    assert f"{best}, epoch 2, is whole: take that one, with fit by --ckpt_path best" in line
    assert cli.main(["fit", f"--out={run}", "--ckpt_path=best"]) == 0
    last.write_bytes(whole)
    best.write_bytes(b"cut")
    for command in (["validate", str(run)], ["inspect", str(run)], ["export", str(run), str(run / "a.onnx")]):
        assert f"{last}, epoch 2, is whole" in complaint(capsys, *command)


def test_how_far_a_checkpoint_was(run: Path) -> None:
    best = run / "checkpoints" / "best.ckpt"
    content = torch.load(best, weights_only=True)
    torch.save({**content, "global_step": content["global_step"] + 1, "epoch": 2}, best)
    assert str(find_saved(run)) == f"{best}, step 9 in epoch 3"
    torch.save(content["state_dict"], best)
    assert str(find_saved(best)) == str(best)
    assert find_saved("vgg11") is None
    with pytest.raises(ConfigError, match=r"expected a run folder of netdeconv fit, found no"):
        find_saved(run / "logs")


@pytest.mark.parametrize("what", ["nowhere", "nowhere/last.ckpt"])
def test_nothing_to_evaluate_there(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for argv in (["validate", what], ["validate", "--out", what], ["test", what], ["test", "--ckpt_path", what]):
        line = complaint(capsys, *argv)
        assert what in line and ("expected a checkpoint" in line or "expected the folder of a run" in line)
    assert list(tmp_path.iterdir()) == []
