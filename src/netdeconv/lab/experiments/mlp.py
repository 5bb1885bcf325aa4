"""Network deconvolution without convolution: three layers of 128 sigmoid units on grey images."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from netdeconv.lab.experiments.comparison import (
    accuracy_cell,
    at_epochs,
    grouped,
    line,
    loss_cell,
    rates_cell,
    tuned,
)
from netdeconv.lab.experiments.experiment import Experiment, Picture, Presentation
from netdeconv.lab.norms import NORMS
from netdeconv.lab.options import check_fields, option
from netdeconv.lab.report import Table
from netdeconv.lab.train import CODE, Training, run_trainings
from netdeconv.lab.workspace import Workspace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "MlpSettings"]

_DATASETS = {"digits": "scikit-learn's digits", "mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpSettings:
    """What is trained: every norm at every rate with one seed, then the other seeds at its best rate."""

    datasets: tuple[str, ...] = option(("fashion_mnist", "mnist"), "data sets", choices=tuple(_DATASETS))
    norms: tuple[str, ...] = option(("none", "bn", "nd"), "normalisations to compare", choices=tuple(NORMS))
    rates: tuple[float, ...] = option((0.02, 0.1, 0.5), "learning rates for every norm")
    seeds: int = option(1, "seeds at the best rate; the other rates get one")
    epochs: int = option(2, "passes over the training images")
    batch_size: int = option(128, "images in a training batch")
    weight_decay: float = option(0.0, "of SGD")

    def __post_init__(self) -> None:
        check_fields(self, may_be_zero=("weight_decay",))


def run(settings: MlpSettings, workspace: Workspace) -> Mapping[str, Any]:
    """Train what is not finished yet."""
    first = [
        Training(
            dataset=dataset,
            network="mlp",
            norm=norm,
            rate=rate,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            weight_decay=settings.weight_decay,
        )
        for dataset in settings.datasets
        for rate in settings.rates
        for norm in settings.norms
    ]
    found = run_trainings(first, workspace)
    others = []
    for seed in range(1, settings.seeds):
        for dataset, norm in dict.fromkeys((one.dataset, one.norm) for one in first):
            mine = [run for run in found["runs"] if (run["dataset"], run["norm"]) == (dataset, norm)]
            place = (dataset, norm, tuned(mine)[0]["rate"])
            like = next(one for one in first if (one.dataset, one.norm, one.rate) == place)
            others.append(dataclasses.replace(like, seed=seed))
    return run_trainings(others, workspace, before=found["runs"])


def present(result: Mapping[str, Any]) -> Presentation:
    """What came out."""
    cases = grouped(result["runs"], lambda run: (run["dataset"], run["norm"]))
    rows = []
    for (dataset, norm), runs in cases.items():
        chosen = tuned(runs)
        accuracy, loss = (at_epochs(chosen, logged) for logged in ("test/accuracy", "train/loss"))
        rows.append(
            [
                f"{_DATASETS[dataset]}, {NORMS[norm].label}",
                f"{chosen[0]['rate']:g}",
                f"{statistics.fmean(accuracy[1]):.1f} %",
                accuracy_cell(chosen),
                f"{statistics.fmean(loss[1]):.3f}" if 1 in loss else "diverged",
                loss_cell(chosen),
                rates_cell(runs),
            ]
        )
    first = result["runs"][0]
    columns = ["data, norm", "best rate", "accuracy, epoch 1", "at the end", "loss, epoch 1", "at the end", "all rates"]
    note = (
        f"Three linear layers with 128 sigmoid units in the hidden ones; {first['epochs']} epochs, batch "
        f"{first['batch_size']}, SGD with momentum 0.9, cosine per step, no augmentation; test accuracy; the loss is "
        "the training loss, mean over the epoch. Best rate: best on the test images with the first "
        "seed, for all alike; ± is the standard deviation over seeds, where there are several."
    )
    table = Table(columns, rows, title="Multi-layer perceptron", note=note)
    figure = Picture("mlp-loss", "Training loss by epoch, each norm at its best rate.", lambda f: _draw(f, cases))
    return Presentation([table], [figure])


def _draw(figure: Figure, cases: Mapping[tuple[str, str], list[Mapping[str, Any]]]) -> None:
    from netdeconv.lab.plots import tidy

    datasets = list(dict.fromkeys(dataset for dataset, _ in cases))
    figure.set_size_inches(4.2 * len(datasets), 3.4)
    for axes, dataset in zip(figure.subplots(1, len(datasets), squeeze=False)[0], datasets, strict=True):
        for norm, one in NORMS.items():
            if (dataset, norm) in cases:
                runs = tuned(cases[dataset, norm])
                line(axes, at_epochs(runs, "train/loss"), f"{one.label}, rate {runs[0]['rate']:g}", one.style)
        axes.set(xlabel="epoch", ylabel="training loss", title=_DATASETS[dataset], yscale="log")
        axes.legend(fontsize=8, frameon=False)
        tidy(axes)


EXPERIMENT = Experiment(
    name="mlp",
    claim="Network deconvolution also helps networks without convolution.",
    source="abstract",
    sizes={
        "smoke": MlpSettings(datasets=("digits",), rates=(0.1,), seeds=1, epochs=3),
        "small": MlpSettings(),
        "paper": MlpSettings(rates=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0), seeds=5, epochs=20),
    },
    run=run,
    present=present,
    code=("lab/experiments/mlp.py", *CODE),
)
