"""Trainings that experiments are made of: one network, one normalisation, one rate, one seed, on one data set."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from netdeconv.lab.data import create_data
from netdeconv.lab.experiments.experiment import Workspace
from netdeconv.lab.networks import network
from netdeconv.lab.norms import with_norm
from netdeconv.lab.optimizers import make_optimizer
from netdeconv.lab.run_record import RunRecord
from netdeconv.lab.running import fit
from netdeconv.lab.tasks import Classification

__all__ = [
    "CODE",
    "Trial",
    "accuracies",
    "accuracy_cell",
    "best_rate",
    "by_rate",
    "gap_sentence",
    "mean_curve",
    "run_trials",
    "trials_with_seeds",
]

# What a trial's numbers depend on, besides the library.
CODE = (
    "lab/experiments/trials.py", "lab/optimizers.py", "lab/run_record.py", "lab/running.py", "lab/schedules.py",
    "lab/tasks.py",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One training, with a rate that falls to zero on a cosine over all steps; SGD has momentum 0.9.

    Args:
        dataset: by its name.
        network: by its name; ``"mlp"`` has three layers of 128 sigmoid units.
        width: factor on its channels.
        norm: one of :data:`netdeconv.lab.norms.NORMS`.
        rate, seed: of the run; the seed is that of the weights and of the order and augmentation of the images.
        epochs: passes over the training images.
        steps: training steps, fewer than an epoch has; ``None`` for all.
        batch_size, weight_decay: as named.
        whitening: settings that differ from the norm's own.
        optimizer: one of :data:`netdeconv.lab.optimizers.OPTIMIZERS`; the weight decay is SGD's.
        channels_last: store images and weights with the channels last, which changes the speed only.
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
    whitening: tuple[tuple[str, Any], ...] = ()
    channels_last: bool = False
    optimizer: str = "sgd"

    @property
    def name(self) -> str:
        """For the file and the progress."""
        changed = "".join(f"-{key}-{value}" for key, value in self.whitening)
        by = "" if self.optimizer == "sgd" else f"-{self.optimizer}"
        return f"{self.network}-{self.norm}{by}{changed}-batch{self.batch_size}-rate{self.rate:g}-seed{self.seed}"


class DataSets:
    """Data sets that were read once, for trials that follow one another."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[str, bool], Any] = {}

    def get(self, trial: Trial) -> Any:
        """The trial's data, with its batch size and seed. Digits are enlarged to 32x32 for networks that ask for it."""
        small = trial.network in ("mlp", "small")
        key = (trial.dataset, small)
        if key not in self._loaded:
            size = {"digits": 8 if small else 32, "mnist": 28 if small else 32, "fashion_mnist": 28 if small else 32}
            options = {"image_size": size[trial.dataset]} if trial.dataset in size else {}
            self._loaded[key] = create_data(trial.dataset, **options)
            self._loaded[key].setup()
        data = self._loaded[key]
        data.batch_size, data.seed = trial.batch_size, trial.seed
        return data


def make_network(trial: Trial, data: Any) -> nn.Module:
    """The trial's network with its normalisation; weights from torch's generator."""
    size = getattr(data, "image_size", 32)
    if trial.network == "mlp":
        base: nn.Module = mlp(data.in_channels * size**2, data.num_classes)
    else:
        base = network(
            trial.network, trial.width, data.num_classes, in_channels=data.in_channels, image_size=size
        )  # fmt: skip
    return with_norm(base, trial.norm, dict(trial.whitening), name=trial.network)


def mlp(features: int, classes: int) -> nn.Sequential:
    """Three linear layers, 128 sigmoid units in each of the hidden ones, batch normalisation before the sigmoids."""
    hidden = 128
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.Sigmoid(),
        nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.Sigmoid(),
        nn.Linear(hidden, classes),
    )  # fmt: skip


def train(trial: Trial, data: Any, workspace: Workspace) -> dict[str, Any]:
    """Train and test; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trial.seed)
        net = make_network(trial, data)
        optimizer = make_optimizer(trial.optimizer, rate=trial.rate, weight_decay=trial.weight_decay)
        loaders = data.val_dataloader()
        parts = ("validation", "test") if isinstance(loaders, list) else ("test",)
        task = Classification(
            net, classes=data.num_classes, optimizer=optimizer, parts=parts, channels_last=trial.channels_last
        )
        record = RunRecord()
        steps = len(data.train_dataloader()) if trial.steps is None else trial.steps
        workspace.progress.start_run(trial.name, trial.epochs * steps)
        callbacks = [record, workspace.progress.callback()]
        fit(task, data, epochs=trial.epochs, steps=trial.steps, callbacks=callbacks, device=workspace.device)
    seconds = record.step_seconds
    return {
        "curves": record.curves,
        "steps": len(seconds),
        "seconds_per_step": statistics.median(seconds),
        "parameters": sum(p.numel() for p in net.parameters()),
        "diverged": not all(map(math.isfinite, record.curves["train/loss"])),
    }


def run_trials(
    trials: Iterable[Trial],
    workspace: Workspace,
    data: DataSets | None = None,
    before: Sequence[Mapping[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Every trial's numbers, next to what it was; finished ones are not repeated.

    Processes with the same run folder share the work: each takes the next trial that no other one is at, and waits for
    the others when none is left. What all of them have finished, behind the numbers from ``before``, is published
    after every trial.
    """
    data = DataSets() if data is None else data
    plan = list(trials)
    found: dict[int, dict[str, Any]] = {}
    for attempt in (workspace.part_if_free, workspace.part):
        for number, trial in enumerate(plan):
            if number in found:
                continue
            compute = partial(_trained, trial, data, workspace)
            if attempt(trial.name, dataclasses.asdict(trial), compute) is None:
                continue
            with workspace.alone():
                found |= _finished(plan, found, workspace)
                workspace.publish({"runs": [*before, *(found[one] for one in sorted(found))]})
    return [found[number] for number in range(len(plan))]


def _trained(trial: Trial, data: DataSets, workspace: Workspace) -> dict[str, Any]:
    return train(trial, data.get(trial), workspace)


def _finished(plan: Sequence[Trial], known: Collection[int], workspace: Workspace) -> dict[int, dict[str, Any]]:
    """What has been finished since, by whichever process: number in the plan -> the trial and its numbers."""
    found = {}
    for number, trial in enumerate(plan):
        settings = dataclasses.asdict(trial)
        if number not in known and (result := workspace.finished(trial.name, settings)) is not None:
            found[number] = {**settings, "whitening": dict(trial.whitening), **result}
    return found


def by_rate(entries: Iterable[Mapping[str, Any]]) -> dict[float, list[Mapping[str, Any]]]:
    """Entries of one method by their rate."""
    groups: dict[float, list[Mapping[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(entry["rate"], []).append(entry)
    return groups


def accuracies(entries: Iterable[Mapping[str, Any]]) -> list[float]:
    """Last test accuracy of each run, in per cent."""
    return [100 * (entry["curves"]["test/accuracy"][-1] or 0.0) for entry in entries]


def best_rate(entries: Iterable[Mapping[str, Any]]) -> float:
    """The rate with the highest mean test accuracy; as in the paper's code there are no images to choose by."""
    groups = by_rate(entries)
    return max(groups, key=lambda rate: statistics.fmean(accuracies(groups[rate])))


def accuracy_cell(entries: Sequence[Mapping[str, Any]]) -> str:
    """Mean test accuracy and, of several seeds, its standard deviation."""
    values = accuracies(entries)
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread} %"


def mean_curve(entries: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """A logged number by epoch, mean over the runs; NaN where one of them was not finite."""
    curves = [[math.nan if v is None else v for v in entry["curves"][name]] for entry in entries]
    return [statistics.fmean(at) for at in zip(*curves, strict=True)]


def trials_with_seeds(first: Sequence[Trial], found: Sequence[Mapping[str, Any]], seeds: int) -> list[Trial]:
    """The other seeds of every data set and norm, at its best rate."""
    more = []
    for seed in range(1, seeds):
        for dataset, norm in dict.fromkeys((trial.dataset, trial.norm) for trial in first):
            mine = [entry for entry in found if (entry["dataset"], entry["norm"]) == (dataset, norm)]
            best = best_rate(mine)
            like = next(t for t in first if (t.dataset, t.norm, t.rate) == (dataset, norm, best))
            more.append(dataclasses.replace(like, seed=seed))
    return more


def gap_sentence(nd: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], name: str) -> str:
    """How far network deconvolution is ahead of another norm, and whether that is more than the seeds' spread."""
    mine, theirs = accuracies(nd), accuracies(other)
    gap = statistics.fmean(mine) - statistics.fmean(theirs)
    spread = max((statistics.stdev(v) for v in (mine, theirs) if len(v) > 1), default=None)
    seeds = "one seed" if spread is None else f"seeds differ by {spread:.1f}"
    if spread is not None and abs(gap) <= spread:
        return f"network deconvolution and {name} do not differ by more than the seeds do ({gap:+.1f} points, {seeds})."
    word = "ahead of" if gap > 0 else "behind"
    return f"network deconvolution is {abs(gap):.1f} points {word} {name} at its best rate ({seeds})."
