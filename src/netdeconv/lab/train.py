"""One way to train: an experiment declares trainings, each is run once, and a record is kept of it."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import os
import statistics
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from netdeconv.lab.allocator import keep_freed_memory
from netdeconv.lab.optimizers import make_optimizer
from netdeconv.lab.store import read_json, write_whole

if TYPE_CHECKING:
    from netdeconv.lab.workspace import Workspace

__all__ = ["CODE", "RECIPE_CODE", "DataSets", "Record", "Training", "make_network", "mlp", "run_trainings", "train"]

# What the numbers of a training depend on, besides the library; and of one by a recipe.
CODE = ("lab/train.py", "lab/recorder.py", "lab/optimizers.py", "lab/schedules.py", "lab/tasks.py")
RECIPE_CODE = (*CODE, "lab/training", "lab/recipes")

# Images of their own size for these networks; elsewhere the small ones are enlarged or framed to 32x32.
_OWN_SIDE = {"digits": (8, ("demo", "mlp", "small")), "mnist": (28, ("mlp",)), "fashion_mnist": (28, ("mlp",))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """One training, with a learning rate that falls to zero on a cosine over all steps; SGD has momentum 0.9.

    With a recipe, ``netdeconv fit`` trains instead: the settings below are given to it as options, everything else is
    the recipe's, and a training that was stopped goes on from its last checkpoint.

    Args:
        dataset: by its name; with a recipe, what its folder is called.
        network: by its name. ``"mlp"`` has three layers of 128 sigmoid units; ``"demo"`` is
            :class:`~netdeconv.lab.networks.SmallConvNet` written with the layers of its norm, not converted.
        norm: one of :data:`netdeconv.lab.norms.NORMS`.
        rate, seed: of the run; the seed is that of the weights and of the order and augmentation of the images.
        width: factor on the network's channels.
        epochs: passes over the training images.
        steps: training steps in an epoch, fewer than it has; ``None`` for all.
        batch_size: as named.
        weight_decay: of SGD.
        optimizer: one of :data:`netdeconv.lab.optimizers.OPTIMIZERS`; it and its weight decay are the recipe's if there
            is one.
        whitening: settings that differ from the norm's own.
        channels_last: store images and weights with the channels last, which changes the speed only.
        fresh_statistics: record :attr:`Record.fresh_accuracy`; not with a recipe.
        recipe: name or file of a recipe.
        options: further ones of ``netdeconv fit``, with a recipe.
        root: folder of the data, with a recipe; not a part of what a training is known by.
    """

    dataset: str
    network: str
    norm: str
    rate: float
    seed: int = 0
    width: float = 1.0
    epochs: int = 1
    steps: int | None = None
    batch_size: int = 128
    weight_decay: float = 1e-3
    optimizer: str = "sgd"
    whitening: tuple[tuple[str, Any], ...] = ()
    channels_last: bool = False
    fresh_statistics: bool = False
    recipe: str = ""
    options: tuple[str, ...] = ()
    root: Path | None = None

    @property
    def name(self) -> str:
        """For the file and the progress."""
        changed = "".join(f"-{key}-{value}" for key, value in self.whitening)
        by = "" if self.optimizer == "sgd" else f"-{self.optimizer}"
        network = self.network.replace(":", "-")
        return f"{network}-{self.norm}{by}{changed}-batch{self.batch_size}-rate{self.rate:g}-seed{self.seed}"

    def settings(self) -> dict[str, Any]:
        """What the numbers depend on."""
        others = ("optimizer", "weight_decay") if self.recipe else ("recipe", "options")
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in (*others, "root")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What came out of a training.

    Args:
        curves: one list per logged number, one value per epoch; NaN, in JSON ``None``, where it is not finite or was
            not measured.
        steps: training steps.
        parameters: of the network.
        seconds_per_step: median over the steps: forward, backward, optimiser and Lightning's work around them.
        seconds_per_late_step: mean over the second half of the steps, rare expensive ones included.
        fresh_accuracy: test accuracy after the first epoch, the running statistics computed anew from all training
            images.
    """

    curves: dict[str, list[float]]
    steps: int
    parameters: int
    seconds_per_step: float | None = None
    seconds_per_late_step: float | None = None
    fresh_accuracy: float | None = None


class DataSets(dict[tuple[str, int], Any]):
    """Data sets that were read once, for trainings that follow one another."""

    def of(self, training: Training) -> Any:
        """The data, with the training's batch size and seed."""
        from netdeconv.lab.data import create_data

        own, networks = _OWN_SIDE.get(training.dataset, (32, ()))
        side = own if training.network in networks else 32
        if (training.dataset, side) not in self:
            data: Any = create_data(training.dataset, **({"image_size": side} if networks else {}))
            data.setup()
            self[training.dataset, side] = data
        data = self[training.dataset, side]
        data.batch_size, data.seed = training.batch_size, training.seed
        return data


def make_network(training: Training, data: Any) -> nn.Module:
    """The training's network with its normalisation; weights from torch's generator."""
    from netdeconv.lab.networks import SmallConvNet, network
    from netdeconv.lab.norms import with_norm

    size = getattr(data, "image_size", 32)
    shape = {"in_channels": data.in_channels, "image_size": size}
    if training.network == "demo":
        return SmallConvNet(training.norm, num_classes=data.num_classes, **shape)
    if training.network == "mlp":
        base: nn.Module = mlp(data.in_channels * size**2, data.num_classes)
    else:
        base = network(training.network, training.width, data.num_classes, **shape)
    return with_norm(base, training.norm, dict(training.whitening), name=training.network)


def mlp(features: int, classes: int) -> nn.Sequential:
    """Three linear layers, 128 sigmoid units in each of the hidden ones, batch normalisation before the sigmoids."""
    hidden = 128
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.Sigmoid(),
        nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.Sigmoid(),
        nn.Linear(hidden, classes),
    )  # fmt: skip


def train(training: Training, workspace: Workspace, data: DataSets, *, weights: Path | None = None) -> Record:
    """Train and test on one device; the global generator stays as it was.

    Args:
        training: what to do.
        workspace: says where, and shows the progress.
        data: has read the data, or will.
        weights: file for the trained network's state dict; not with a recipe.

    Raises:
        ConfigError: data that are not there, or settings that cannot apply.
        KeyboardInterrupt: on Ctrl-C, where Lightning would exit with code 1; after SIGTERM with the exit code 143.
    """
    if training.recipe:
        assert weights is None and not training.fresh_statistics
        return _train_by_recipe(training, workspace)
    images = data.of(training)

    from lightning.pytorch import Trainer
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from netdeconv.lab.fit_command import TERMINATED
    from netdeconv.lab.recorder import Recorder
    from netdeconv.lab.tasks import Classification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        net = make_network(training, images)
        optimizer = make_optimizer(training.optimizer, rate=training.rate, weight_decay=training.weight_decay)
        parts = ("validation", "test") if isinstance(images.val_dataloader(), list) else ("test",)
        task = Classification(
            net, classes=images.num_classes, optimizer=optimizer, parts=parts, channels_last=training.channels_last
        )
        recorder = Recorder(workspace.progress, images.parts if training.fresh_statistics else None)
        steps = len(images.train_dataloader()) if training.steps is None else training.steps
        workspace.progress.start_run(training.name, training.epochs * steps)
        keep_freed_memory()
        trainer = Trainer(
            accelerator=workspace.device,
            devices=1,
            max_epochs=training.epochs,
            limit_train_batches=training.steps,
            callbacks=[recorder],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
        )
        try:
            trainer.fit(task, datamodule=images)
        except SIGTERMException:
            raise KeyboardInterrupt(TERMINATED) from None
        except SystemExit:
            if not trainer.interrupted:
                raise
            raise KeyboardInterrupt from None
    if weights is not None:
        buffer = io.BytesIO()
        torch.save(net.state_dict(), buffer)
        write_whole(weights, buffer.getvalue())
    seconds = recorder.step_seconds
    return Record(
        curves=recorder.curves,
        steps=len(seconds),
        parameters=sum(p.numel() for p in net.parameters()),
        seconds_per_step=statistics.median(seconds),
        seconds_per_late_step=statistics.fmean(seconds[len(seconds) // 2 :]),
        fresh_accuracy=recorder.fresh_accuracy,
    )


def _train_by_recipe(training: Training, workspace: Workspace) -> Record:
    from netdeconv.lab.fit_command import DIVERGED, run

    folder = workspace.folder / "fits" / workspace.path(training.name, training.settings()).stem
    words = [
        *("--config", training.recipe, "--network", training.network, "--width", f"{training.width:g}"),
        *("--norm", training.norm, "--optimizer.lr", f"{training.rate:g}", "--seed_everything", str(training.seed)),
        *("--data.root", str(training.root), "--data.batch_size", str(training.batch_size)),
        *("--trainer.max_epochs", str(training.epochs), *training.options),
        *(word for key, value in training.whitening for word in (f"--whitening.{key}", str(value))),
        *(() if training.steps is None else ("--trainer.limit_train_batches", str(training.steps))),
        *(("--channels_last", "true") if training.channels_last else ()),
        *("--trainer.accelerator", workspace.device, "--trainer.enable_progress_bar", "false", "--out", str(folder)),
        *(("--trainer.devices", "1") if workspace.device == "cuda" else ()),
    ]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(
        sys.stderr if workspace.progress.show else nowhere
    ):
        code = run("fit", words, quiet=True)
    if code not in (0, DIVERGED):  # a rate that is too high is a result as well
        raise KeyboardInterrupt(code)
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    curves = {name: [float(row[name] or "nan") for row in rows] for name in rows[0] if "/" in name}
    about: Mapping[str, Any] = read_json(folder / "run.json")
    return Record(curves=curves, steps=int(rows[-1]["step"]), parameters=about["parameters"])


def run_trainings(
    trainings: Iterable[Training],
    workspace: Workspace,
    *,
    before: Sequence[Mapping[str, Any]] = (),
    mark: Mapping[str, Any] | None = None,
    **about: Any,
) -> dict[str, Any]:
    """The result of an experiment: settings and record of every training in ``runs``; finished ones are not repeated.

    Processes with the same run folder share the work: each takes the next training that no other one is at, and waits
    for the others when none is left. What all of them have finished is published after every training
    that was not finished at the start.

    Args:
        trainings: all of them.
        workspace: keeps what is finished.
        before: runs that come first.
        mark: is added to every run but these.
        about: what else the result has.
    """
    data = DataSets()
    plan = list(trainings)
    found: dict[int, dict[str, Any]] = {}

    def result() -> dict[str, Any]:
        found.update({k: {**run, **(mark or {})} for k, run in _finished(plan, found, workspace).items()})
        return {**about, "runs": [*before, *(found[one] for one in sorted(found))]}

    workspace.progress.expect(len(plan))
    result()
    for attempt in (workspace.part_if_free, workspace.part):
        for number, training in enumerate(plan):
            if number in found:
                continue
            compute = partial(_record, training, workspace, data)
            if attempt(training.name, training.settings(), compute) is None:
                continue
            with workspace.alone():
                workspace.publish(result())
    return result()


def _record(training: Training, workspace: Workspace, data: DataSets) -> dict[str, Any]:
    return dataclasses.asdict(train(training, workspace, data))


def _finished(plan: Sequence[Training], known: Collection[int], workspace: Workspace) -> dict[int, dict[str, Any]]:
    """What has been finished since, by whichever process: number in the plan -> settings and record."""
    found = {}
    for number, training in enumerate(plan):
        settings = training.settings()
        if number not in known and (record := workspace.finished(training.name, settings)) is not None:
            found[number] = {**settings, "whitening": dict(training.whitening), **record}
    return found
