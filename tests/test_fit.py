"""The commands fit, validate and test: what is in a run folder, and mistakes that take one line."""

from __future__ import annotations

import csv
import errno
import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import data_trees
from netdeconv import cli
from terminals import environment
from test_resume import checkpoint, rows

pytest.importorskip("lightning")
pytest.importorskip("sklearn")

from netdeconv.lab import fit_command, norms, store
from netdeconv.lab.data import DATASETS
from netdeconv.lab.training import arguments, recipes
from netdeconv.lab.training.options import DATA_OPTIONS
from netdeconv.lab.training.settings import resolved_data

SETTINGS = ["--config=digits", "--width=0.25", "--trainer.accelerator=cpu", "--trainer.max_epochs=2"]


def complaint(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a mistake leaves on standard error."""
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert cli.main(["fit", *SETTINGS, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(finished, tmp_path / "run")


# --------------------------------------------------------------------------------------------------- run folder


def test_a_run_folder_holds_everything(finished: Path) -> None:
    settings = yaml.safe_load((finished / "config.yaml").read_text())
    assert settings["data"]["name"] == "digits"
    assert settings["optimizer"]["init_args"]["momentum"] == 0.9
    about = json.loads((finished / "run.json").read_text())
    (start,) = about["starts"]
    assert about["seed"] == 0
    assert {"torch", "torchvision", "lightning", "netdeconv"} <= set(start["versions"])
    assert {"git", "command", "time", "processes"} <= set(start)
    assert [row["epoch"] for row in rows(finished)] == [1, 2]
    assert {"train/loss", "validation/loss", "validation/accuracy", "test/accuracy"} <= set(rows(finished)[0])
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((finished / "logs" / "tensorboard").glob("events.*"))
    assert (finished / "logs" / "csv" / "version_0" / "metrics.csv").is_file()
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}


def test_the_best_checkpoint_is_that_of_the_best_epoch(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = max(rows(finished), key=lambda row: row["validation/accuracy"])
    assert checkpoint(finished, "best")["global_step"] == best["step"]
    for command, numbers in (("validate", ("validation/loss", "validation/accuracy")), ("test", ("test/accuracy",))):
        assert cli.main([command, "--out", str(finished), "--trainer.accelerator=cpu"]) == 0
        found = dict(line.split() for line in capsys.readouterr().out.splitlines())
        for name in numbers:
            assert float(found[name]) == pytest.approx(best[name], rel=1e-5)


def test_a_finished_run_is_left_as_it_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = rows(run), checkpoint(run)["state_dict"]
    assert cli.main(["fit", "--out", str(run)]) == 0  # the settings are in the folder
    assert "finished before, after 2 epochs" in capsys.readouterr().out
    assert rows(run) == before[0]
    assert all(torch.equal(checkpoint(run)["state_dict"][key], value) for key, value in before[1].items())


def test_the_seed_changes_weights_and_order(finished: Path, tmp_path: Path) -> None:
    assert cli.main(["fit", *SETTINGS, "--seed_everything=1", "--out", str(tmp_path)]) == 0
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["data"]["seed"] == 1
    assert rows(tmp_path)[0]["train/loss"] != rows(finished)[0]["train/loss"]


def test_early_stop_mixed_precision_and_channels_last(tmp_path: Path) -> None:
    options = [
        "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=train/loss",
        "--trainer.callbacks.divergence_threshold=0.001", "--trainer.callbacks.check_on_train_epoch_end=true",
        "--trainer.precision=bf16-mixed", "--channels_last=true", "--norm=bn",
    ]  # fmt: skip
    assert cli.main(["fit", *SETTINGS, *options, "--out", str(tmp_path)]) == 0
    assert len(rows(tmp_path)) == 1  # of two epochs
    assert checkpoint(tmp_path)["state_dict"]["net.conv1.weight"].dtype == torch.float32


def test_an_epoch_without_evaluation_has_no_numbers_of_another(tmp_path: Path) -> None:
    options = ["--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=2", "--trainer.limit_train_batches=2"]
    assert cli.main(["fit", *SETTINGS, *options, "--out", str(tmp_path)]) == 0
    with (tmp_path / "metrics.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [bool(row["validation/accuracy"]) for row in found] == [False, True, False]
    assert all(row["train/loss"] for row in found)


def test_segmentation_on_a_generated_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_trees.cityscapes(tmp_path, each=2, height=32, width=64)
    options = [
        "--config=cityscapes-fcn", "--network=torchvision:lraspp_mobilenet_v3_large", "--norm=bn",
        f"--data.root={tmp_path}", "--data.num_workers=0", "--data.image_size=32", "--data.base_size=32",
        "--data.batch_size=2", "--trainer.max_epochs=1", "--trainer.accelerator=cpu", f"--out={tmp_path / 'run'}",
    ]  # fmt: skip
    assert cli.main(["fit", *options]) == 0
    (row,) = rows(tmp_path / "run")
    assert 0 <= row["validation/miou"] <= 1
    assert {"train/loss", "validation/loss", "validation/pixel_accuracy"} <= set(row)


def test_cifar_100_and_imagenet_on_generated_trees(tmp_path: Path) -> None:
    data_trees.cifar(tmp_path, classes=100)
    data_trees.image_folder(tmp_path / "imagenet", classes=2)
    trees = {
        "cifar100-1-epoch": ["--network=vgg11", "--width=0.0625"],
        "imagenet-90-epochs": ["--data.num_workers=0", "--data.image_size=32", "--data.resize=36"],
    }
    for recipe, options in trees.items():
        out = tmp_path / recipe
        shared = ["--data.batch_size=4", "--trainer.max_epochs=1", "--trainer.accelerator=cpu", f"--out={out}"]
        assert cli.main(["fit", f"--config={recipe}", f"--data.root={tmp_path}", *shared, *options]) == 0
        (row,) = rows(out)
        (measure,) = [name for name in row if name.endswith("/accuracy") and not name.startswith("train")]
        assert 0 <= row[measure] <= 1


def test_help_names_recipes_and_the_options_of_every_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "--config=digits", "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: netdeconv fit")
    some = {"--norm", "--schedule.name", "--trainer.max_epochs", "--ckpt_path", "--help-all"}
    assert some <= set(re.findall(r"--[\w.-]+", shown))
    assert {*recipes.recipes(), *norms.NORMS, *DATA_OPTIONS} <= set(re.findall(r"[\w+-]+", shown))
    assert shown.count("\n") < 130 and max(map(len, shown.splitlines())) <= 120
    for command in ("validate", "test"):
        assert cli.main([command, "-h"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: netdeconv {command} RUN|CHECKPOINT")


def test_help_of_everything_is_the_parsers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "--help-all"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: netdeconv fit")
    assert {"--norm", "--schedule.name", "--trainer.limit_train_batches", "--ckpt_path"} <= set(shown.split())


def test_the_options_of_the_data_sets_are_those_of_their_classes() -> None:
    assert list(DATA_OPTIONS) == list(DATASETS)
    for name, known in DATA_OPTIONS.items():
        assert sorted(known) == sorted(resolved_data({"name": name}).keys() - {"name"}), name


def test_the_trainers_options_are_those_of_its_class() -> None:
    from lightning.pytorch import Trainer

    assert arguments._trainer_options() == list(inspect.signature(Trainer).parameters)


NAMES = """
import sys
from netdeconv import cli
code = cli.main(sys.argv[1:])
print(code, sorted({"lightning", "torchvision", "torchmetrics"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["fit", "--help"], 0),
        (["fit", "--config=digits", "--nrom=bn"], 2),
        (["fit", "digits"], 2),
        (["fit", "--config=digits", "--network=vgg111", "--out=x"], 2),
        (["fit", "--config=digits", "--optimizer.lrr=1"], 2),
        (["fit", "--config=digits", "--trainer.max_epoch=3"], 2),
        (["fit", "--config=cifar10-1-epoch", "--data.image_size=8"], 2),
        (["validate", "--out=nowhere"], 2),
        (["recipes"], 0),
    ],
)
def test_names_are_checked_before_lightning_is_loaded(argv: list[str], code: int) -> None:
    command = [sys.executable, "-c", NAMES, *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    loaded = "['torchvision']" if "--network=vgg111" in argv else "[]"  # to look there for a name that is near
    assert done.stdout.splitlines()[-1] == f"{code} {loaded}"


# ----------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected a data set, got none"),
        (["--config=digts"], "there is no recipe digts. The nearest name is digits"),
        (["--config=nowhere/x.yaml"], "there is no file nowhere/x.yaml"),
        (["--config=digits", "--data=digit"], "there is no digit. The nearest name is digits"),
        (["--config=digits", "--network=vgg12"], "--network: there is no vgg12. The nearest name is vgg1"),
        (["--config=digits", "--norm=nd-papr"], "there is no nd-papr. The nearest name is nd-paper"),
        (["--config=digits", "--optimizer=SDG"], "torch.optim has no SDG. The nearest name is SGD"),
        (["--config=digits", "--optimizer.lrr=1"], "--optimizer.lrr: there is no such option"),
        (["--config=digits", "--data.bach_size=8"], "--data.bach_size: there is no such option. The nearest"),
        (["--config=digits", "--data.batch_size=many"], "--data.batch_size: expected int, got many"),
        (["--config=cifar10-1-epoch", "--data.download=9"], "--data.download: expected bool, got 9"),
        (["--config=digits", "--whitening.update_evry=4"], "The nearest name is update_every"),
        (["--config=digits", "--trainer.max_epochs=ten"], "--trainer.max_epochs: expected Optional[int], got ten"),
        (["--config=digits", "--optimizer.lr=fast"], "--optimizer.lr: expected float | torch.Tensor, got fast"),
        (["--config=digits", "--trainer.precision=12"], "--trainer.precision: expected Union[Literal[64, 32, 16], "),
        (["--config=digits", "--trainer.max_epoch=3"], "--trainer.max_epoch: there is no such option. The nearest"),
        (["--config=digits", "--trainer.accelerator=gpx"], "--trainer: You selected an invalid accelerator name"),
        (["--config=digits", "--schedule.name=linear"], "got 'linear'"),
        (["--config=digits", "--checkpoint.mode=best"], "expected checkpoint.mode max or min, got 'best'"),
        (["--config"], "--config: expected a value"),
        (["--config=digits", "--compile"], "--compile: expected bool, got no value"),
        (["--config=digits", "--trainer.callbacks+=Early"], "--trainer.callbacks: expected Union[list["),
        (["--config=digits", "--seed_everything=maybe"], "--seed_everything: does not take maybe"),
        (["--config=digits", "--ckpt_path=nowhere.ckpt"], "there is no nowhere.ckpt"),
    ],
)
def test_a_mistake_is_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in complaint(capsys, "fit", *options, f"--out={tmp_path / 'new'}")
    assert not (tmp_path / "new").exists()


def test_missing_data_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NETDECONV_DATA", str(tmp_path))
    options = ["--config=cifar10-1-epoch", "--width=0.1", "--trainer.accelerator=cpu", f"--out={tmp_path / 'run'}"]
    assert "torchvision.datasets import CIFAR10" in complaint(capsys, "fit", *options)


def test_other_settings_are_refused_in_the_same_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = ["fit", *SETTINGS, "--optimizer.lr=0.05", "--out", str(run)]
    assert "optimizer.init_args.lr 0.1, this one has 0.05" in complaint(capsys, *other)
    free = ["fit", *SETTINGS, "--checkpoint.every_n_steps=7", "--trainer.log_every_n_steps=1", "--out", str(run)]
    assert cli.main(free) == 0


def test_a_folder_is_free_until_something_was_trained_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vgg = ["fit", "--config=digits", "--network=vgg11", "--width=0.02", "--trainer.limit_train_batches=1"]
    options = ["--trainer.limit_val_batches=1", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    command = [*vgg, *options, f"--out={tmp_path}"]
    line = complaint(capsys, *command)  # five poolings do not fit images of 8x8
    assert "Output size is too small. The images do not have the size that the network takes" in line
    assert list(tmp_path.iterdir()) == []
    assert cli.main([*command, "--data.image_size=32"]) == 0
    assert "data.image_size 32, this one has 8" in complaint(capsys, *command)


@pytest.mark.parametrize("norm", ["bn", "swbn"])
def test_batch_norm_of_one_value(norm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = ["fit", "--config=digits", "--network=torchvision:mobilenet_v3_small", f"--norm={norm}"]
    one = ["--data.batch_size=1", "--trainer.max_epochs=1", "--trainer.accelerator=cpu", f"--out={tmp_path}"]
    assert "Batch normalisation cannot train on one image" in complaint(capsys, *net, *one)


def test_a_value_that_the_optimizer_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Invalid learning rate: -1" in complaint(
        capsys, "fit", *SETTINGS, "--optimizer.lr=-1", f"--out={tmp_path}"
    )


def test_damaged_settings_in_the_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.yaml").write_bytes(b"\xff\xfe\x00")
    assert "config.yaml: is damaged" in complaint(capsys, "fit", *SETTINGS, "--out", str(run))
    assert "config.yaml: cannot be read as YAML" in complaint(capsys, "fit", "--out", str(run))


def test_the_data_option_wins_over_every_recipe(tmp_path: Path) -> None:
    recipes = ["--config=digits", "--config=mnist", "--network=small", "--width=0.25"]
    chosen: Any = fit_command.built(
        "fit", arguments.full_arguments("fit", [*recipes, "--data=digits", f"--out={tmp_path}"])
    )
    assert chosen.config.data["name"] == "digits"


@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_damaged_checkpoint(command: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("last", "best"):
        path = run / "checkpoints" / f"{name}.ckpt"
        path.write_bytes(path.read_bytes()[:-2000])
    assert "damaged or of another kind" in complaint(capsys, command, "--out", str(run))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--norm=bn"], "is of another network: norm nd. Try --norm nd"),
        (["--width=0.5"], "is of another network: width 0.25. Try --width 0.25"),
        (["--whitening.block_size=3"], "is of another network: net.conv"),
        (["--config=cifar100-1-epoch", "--network=small"], "is of 10 classes, the data have 100"),
    ],
)
def test_a_checkpoint_of_another_network(
    options: list[str], message: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = finished / "checkpoints" / "best.ckpt"
    given = [*SETTINGS, *options, f"--out={tmp_path}", f"--ckpt_path={best}"]
    assert message in complaint(capsys, "test", *given)


def test_a_file_that_is_no_training_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"weight": torch.zeros(1)}, path)
    assert "expected a checkpoint of netdeconv fit" in complaint(
        capsys, "test", *SETTINGS, f"--out={tmp_path}", f"--ckpt_path={path}"
    )


def test_nothing_trained_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"expected a checkpoint in {tmp_path}" in complaint(capsys, "test", *SETTINGS, "--out", str(tmp_path))
    assert f"--out {tmp_path}: expected the folder of a run" in complaint(capsys, "validate", "--out", str(tmp_path))
    assert "expected a checkpoint in" in complaint(capsys, "test", "--data.name", "digits", "--out", str(tmp_path))


def full_from(call: int) -> Callable[..., None]:
    """A way to write checkpoints that fills the disk from this call on, leaving half a file."""
    calls = 0
    write = Path.write_bytes

    def write_bytes(self: Path, content: bytes) -> int:
        nonlocal calls
        calls += ".ckpt" in self.name
        if calls < call or ".ckpt" not in self.name:
            return write(self, content)
        write(self, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    return write_bytes  # type: ignore[return-value]


def test_on_a_full_disk_the_last_good_checkpoint_survives(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["fit", *SETTINGS, "--checkpoint.every_n_steps=4", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(store.Path, "write_bytes", full_from(3))
        line = complaint(capsys, *command)
    assert "No space left on device. The checkpoint from before is kept" in line
    assert checkpoint(tmp_path)["global_step"] == 8
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    assert cli.main(command) == 0
    assert rows(tmp_path) == rows(finished)


def test_a_full_disk_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from netdeconv.lab.training.callbacks import History

    def full(self: History) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(History, "write", full)
    assert f"cannot write to {tmp_path}: No space left" in complaint(capsys, "fit", *SETTINGS, "--out", str(tmp_path))
