"""Network deconvolution without convolution: three layers of 128 sigmoid units on grey images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from netdeconv.lab.experiments.experiment import Experiment, Picture, Presentation, Workspace
from netdeconv.lab.experiments.trials import (
    CODE,
    NAMES,
    DataSets,
    Trial,
    accuracy_cell,
    best_rate,
    by_rate,
    mean_curve,
    run_trials,
    trials_with_seeds,
)
from netdeconv.lab.options import check_fields, option
from netdeconv.lab.report import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "MlpSettings"]

_DATASETS = {"digits": "scikit-learn's digits", "mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpSettings:
    """What is trained: every norm at every rate with one seed, then the other seeds at its best rate."""

    datasets: tuple[str, ...] = option(("fashion_mnist", "mnist"), "data sets", choices=tuple(_DATASETS))
    norms: tuple[str, ...] = option(("none", "bn", "nd"), "normalisations to compare", choices=tuple(NAMES))
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
        Trial(
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
    workspace.progress.expect(len(first) + (settings.seeds - 1) * len(settings.datasets) * len(settings.norms))
    data = DataSets()
    found = run_trials(first, workspace, data)
    more = trials_with_seeds(first, found, settings.seeds)
    return {"runs": found + run_trials(more, workspace, data, before=found)}


def present(result: Mapping[str, Any]) -> Presentation:
    """What came out."""
    cases: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in result["runs"]:
        cases.setdefault((run["dataset"], run["norm"]), []).append(run)
    rows = []
    for (dataset, norm), runs in cases.items():
        rate = best_rate(runs)
        best = by_rate(runs)[rate]
        losses = mean_curve(best, "train/loss")
        tried = ", ".join(f"{accuracy_cell(same)} ({one:g})" for one, same in sorted(by_rate(runs).items()))
        rows.append(
            [
                f"{_DATASETS[dataset]}, {NAMES[norm]}",
                f"{rate:g}",
                f"{100 * mean_curve(best, 'test/accuracy')[0]:.1f} %",
                accuracy_cell(best),
                f"{losses[0]:.3f}",
                f"{losses[-1]:.3f}",
                tried,
            ]
        )
    first = result["runs"][0]
    columns = ["data, norm", "best rate", "accuracy, epoch 1", "at the end", "loss, epoch 1", "at the end", "all rates"]
    note = (
        f"Three linear layers with 128 sigmoid units in the hidden ones; {first['epochs']} epochs, batch "
        f"{first['batch_size']}, SGD with momentum 0.9, cosine per step, no augmentation; test accuracy; the loss is "
        "the training loss, mean over the epoch. Best rate: best on the test images, for all alike; ± is the standard "
        "deviation over seeds, where there are several."
    )
    table = Table(columns, rows, title="Multi-layer perceptron", note=note)
    figure = Picture("mlp-loss", "Training loss by epoch, each norm at its best rate.", lambda f: _draw(f, cases))
    return Presentation([table], [figure])


def _draw(figure: Figure, cases: Mapping[tuple[str, str], list[Mapping[str, Any]]]) -> None:
    from netdeconv.lab.plots import styles_of_norms, tidy

    datasets = list(dict.fromkeys(dataset for dataset, _ in cases))
    figure.set_size_inches(4.2 * len(datasets), 3.4)
    styles = styles_of_norms(NAMES)
    for axes, dataset in zip(figure.subplots(1, len(datasets), squeeze=False)[0], datasets, strict=True):
        for norm, name in NAMES.items():
            if (dataset, norm) in cases:
                runs = cases[dataset, norm]
                losses = mean_curve(by_rate(runs)[best_rate(runs)], "train/loss")
                label = f"{name}, rate {best_rate(runs):g}"
                axes.plot(range(1, len(losses) + 1), losses, label=label, markersize=4, **styles[norm])
        axes.set(xlabel="epoch", ylabel="training loss", title=_DATASETS[dataset], yscale="log")
        axes.xaxis.get_major_locator().set_params(integer=True)
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
