"""The batch size: batch normalisation and network deconvolution on the same number of images in batches of several
sizes, each at its best rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from netdeconv import ConfigError
from netdeconv.lab.experiments.comparison import (
    accuracy_cell,
    best,
    best_rate,
    finals,
    grouped,
    line,
    rates_cell,
)
from netdeconv.lab.experiments.experiment import Experiment, Picture, Presentation
from netdeconv.lab.norms import NORMS
from netdeconv.lab.options import check_fields, option
from netdeconv.lab.report import Table
from netdeconv.lab.train import CODE, Training, run_trainings
from netdeconv.lab.workspace import Workspace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "BatchSizeSettings"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSizeSettings:
    """What is trained.

    Raises:
        ConfigError: a value out of range, or fewer images than are in one batch.
    """

    dataset: str = option("cifar10", "data set", choices=("cifar10", "digits"))
    network: str = option("vgg11", "network of the zoo")
    width: float = option(0.125, "factor on its channels")
    batch_sizes: tuple[int, ...] = option((8, 32, 128, 512), "images in a training batch")
    images: int = option(12800, "training images in all, at most one pass; the steps follow")
    norms: tuple[str, ...] = option(("bn", "nd"), "normalisations to compare", choices=tuple(NORMS))
    rates: tuple[float, ...] = option((0.1, 0.03, 0.01), "learning rates for every norm")
    seeds: int = option(1, "seeds at every rate")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.images < max(self.batch_sizes):
            raise ConfigError(f"expected images of at least a batch, {max(self.batch_sizes)}, got {self.images}")


def run(settings: BatchSizeSettings, workspace: Workspace) -> Mapping[str, Any]:
    """Train what is not finished yet."""
    plan = [
        Training(
            dataset=settings.dataset,
            network=settings.network,
            width=settings.width,
            norm=norm,
            rate=rate,
            seed=seed,
            batch_size=size,
            steps=settings.images // size,
        )
        for seed in range(settings.seeds)
        for size in sorted(settings.batch_sizes, reverse=True)
        for rate in settings.rates
        for norm in settings.norms
    ]
    return run_trainings(plan, workspace)


Cases = Mapping[tuple[int, str], list[Mapping[str, Any]]]


def present(result: Mapping[str, Any]) -> Presentation:
    """What came out."""
    runs = sorted(result["runs"], key=lambda run: run["batch_size"])
    cases = grouped(runs, lambda run: (run["batch_size"], run["norm"]))
    rows = []
    for (size, norm), same in cases.items():
        label, steps = f"{size}, {NORMS[norm].label}", str(same[0]["steps"])
        rows.append([label, steps, f"{best_rate(same):g}", accuracy_cell(best(same)), rates_cell(same)])
    first = result["runs"][0]
    note = (
        f"{first['network']} at width {first['width']:g} on {first['dataset']}: the same number of images for every "
        f"batch size, one pass, rates on a cosine to 0, weight decay {first['weight_decay']:g}, "
        f"{len({run['seed'] for run in result['runs']})} seed(s); test accuracy with the running statistics. Best "
        "rate: best on the test images, for all alike."
    )
    columns = ["batch size, norm", "steps", "best rate", "test accuracy", "all rates"]
    table = Table(columns, rows, title="Test accuracy by batch size", note=note)
    caption = "Test accuracy by batch size, each norm at its best rate."
    picture = Picture("batch-size", caption, lambda figure: _draw(figure, cases))
    return Presentation([table], [picture])


def _draw(figure: Figure, cases: Cases) -> None:
    from netdeconv.lab.plots import tidy

    axes = figure.subplots()
    for norm in dict.fromkeys(norm for _, norm in cases):
        values = {size: finals(best(runs)) for (size, one), runs in cases.items() if one == norm}
        line(axes, values, NORMS[norm].label, NORMS[norm].style)
    axes.set(xlabel="batch size", ylabel="test accuracy, %")
    axes.set_xscale("log", base=2)
    axes.legend(fontsize=8, frameon=False)
    tidy(axes)


EXPERIMENT = Experiment(
    name="batch-size",
    claim="Network deconvolution works with small and large batches as well as batch normalisation does.",
    source="not in the paper's tables",
    sizes={
        "smoke": BatchSizeSettings(dataset="digits", width=0.0625, batch_sizes=(16, 64), images=192, rates=(0.03,)),
        "small": BatchSizeSettings(),
        "paper": BatchSizeSettings(
            width=1.0, batch_sizes=(2, 8, 32, 128, 512), images=50000, rates=(0.3, 0.1, 0.03, 0.01, 0.003), seeds=3
        ),
    },
    run=run,
    present=present,
    code=("lab/experiments/batch_size.py", *CODE),
)
