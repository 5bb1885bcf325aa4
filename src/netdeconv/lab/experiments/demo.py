"""A small network on digits, with batch normalisation and with network deconvolution, each at its best rate."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from netdeconv import ConfigError
from netdeconv.lab.experiments.comparison import (
    METHODS,
    accuracy_cell,
    at_epochs,
    at_rates,
    best,
    by_rate,
    grouped,
    line,
    percent,
)
from netdeconv.lab.experiments.experiment import Experiment, Picture, Presentation
from netdeconv.lab.norms import NORMS
from netdeconv.lab.options import check_fields, option
from netdeconv.lab.report import Table
from netdeconv.lab.train import CODE, Training, run_trainings
from netdeconv.lab.workspace import Workspace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "QUICK", "DemoSettings"]

QUICK: Mapping[str, Any] = {"epochs": 3, "seeds": 2, "rates": (0.01, 0.03, 0.1)}

_NEAR = 1.0  # point: rates whose validation accuracy is this near to the best one's count as good as it
_CHOICE = "validation/accuracy"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What is trained; both norms get the same of everything."""

    epochs: int = option(5, "passes over the training images")
    seeds: int = option(3, "trainings at every learning rate")
    rates: tuple[float, ...] = option((0.01, 0.03, 0.1, 0.3, 1.0), "learning rates to try")
    batch_size: int = option(64, "images in a training batch")
    target: float = option(0.97, "test accuracy to count the epochs to, 0 to 1")

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.target < 1:
            raise ConfigError(f"expected a target accuracy between 0 and 1, got {self.target:g}")


def run(settings: DemoSettings, workspace: Workspace) -> Mapping[str, Any]:
    """Train what is not finished yet; the norms take turns, so that whatever else slows the machine slows both."""
    plan = [
        Training(
            dataset="digits",
            network="demo",
            norm=norm,
            rate=rate,
            seed=seed,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            weight_decay=5e-4,
            fresh_statistics=True,
        )
        for rate, seed, norm in itertools.product(settings.rates, range(settings.seeds), METHODS)
    ]
    return run_trainings(plan, workspace, target=settings.target)


Runs = Mapping[str, Sequence[Mapping[str, Any]]]


def present(result: Mapping[str, Any]) -> Presentation:
    """What came out."""
    runs = grouped(result["runs"], lambda run: run["norm"])
    if len(runs) < len(METHODS):
        return Presentation([])
    chosen = {norm: best(runs[norm], _CHOICE) for norm in METHODS}
    picture = Picture(
        "demo-curves",
        "Left and middle: each norm at its best rate, mean over the seeds, from the worst to the best of them; the "
        "dotted line is the accuracy that “epochs to” counts to. Right: every rate, on the validation images, which "
        "are the ones that chose.",
        lambda figure: _draw(figure, runs, chosen, result["target"]),
    )
    tables = [_table(runs, chosen, result["target"]), _rates_table(runs, chosen)]
    return Presentation(tables, [picture])


def _table(runs: Runs, chosen: Runs, target: float) -> Table:
    first = chosen["bn"][0]
    tried = ", ".join(f"{rate:g}" for rate in by_rate(runs["bn"]))
    rows = [[f"learning rate, best of {tried}", *(f"{same[0]['rate']:g}" for same in chosen.values())]]
    for epoch in _shown(first["epochs"]):
        cells = [percent(at_epochs(same, "test/accuracy").get(epoch, [])) for same in chosen.values()]
        rows.append([f"after epoch {epoch}", *cells])
        if epoch == 1:
            fresh = [percent([100 * run["fresh_accuracy"] for run in same]) for same in chosen.values()]
            rows.append(["after epoch 1, statistics recomputed", *fresh])
    rows.append([f"epochs to {100 * target:g} %", *(_reached(same, target) for same in chosen.values())])
    for label, key in (("median", "seconds_per_step"), ("mean of the second half", "seconds_per_late_step")):
        times = (statistics.median(run[key] for run in runs[norm]) for norm in METHODS)
        rows.append([f"ms per training step, {label}", *(f"{1e3 * seconds:.1f}" for seconds in times)])
    rows.append([f"rates within {_NEAR:g} point of the best", *(_near_best(runs[norm]) for norm in METHODS)])
    note = (
        f"Test accuracy, mean ± standard deviation over {len(chosen['bn'])} seed(s), each norm at the rate with the "
        "highest accuracy on the validation images: scikit-learn's digits, 997 images to train on, 400 to choose by, "
        f"400 to test on. 3x3 convolutions of 16, 32 and 32 channels and a linear layer, {first['parameters']:,} "
        f"parameters with BatchNorm; batch {first['batch_size']}, SGD with momentum 0.9, weight "
        f"decay {first['weight_decay']:g}, cosine per step. Recomputed: the running statistics lag behind in the first "
        "epoch; here they are taken anew from the training images, for both. Times: median over the runs."
    )
    columns = ["", *METHODS.values()]
    return Table(columns, rows, title="A small network on digits", note=note)


def _shown(epochs: int) -> list[int]:
    """All epochs when they are few, else the first ones, some between, and the last."""
    few = range(1, epochs) if epochs <= 10 else (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
    return [*(epoch for epoch in few if epoch < epochs), epochs]


def _reached(runs: Sequence[Mapping[str, Any]], target: float) -> str:
    """Epochs until the test accuracy is there, mean over the seeds that come there."""
    firsts = [next((k for k, a in enumerate(run["curves"]["test/accuracy"], 1) if a >= target), None) for run in runs]
    reached = [epoch for epoch in firsts if epoch is not None]
    if not reached:
        return "not reached"
    mean = f"{statistics.fmean(reached):.1f}"
    return mean if len(reached) == len(runs) else f"{mean} ({len(reached)} of {len(runs)} seeds)"


def _near_best(runs: Sequence[Mapping[str, Any]]) -> str:
    means = [statistics.fmean(values) for values in at_rates(runs, _CHOICE).values()]
    return f"{sum(mean >= max(means) - _NEAR for mean in means)} of {len(means)}"


def _rates_table(runs: Runs, chosen: Runs) -> Table:
    rows = [
        [
            f"{METHODS[norm]}, {rate:g}",
            *(accuracy_cell(same, logged) for logged in (_CHOICE, "test/accuracy")),
            str(sum(None in run["curves"]["train/loss"] for run in same)),
            "chosen" if rate == chosen[norm][0]["rate"] else "",
        ]
        for norm in METHODS
        for rate, same in by_rate(runs[norm]).items()
    ]
    return Table(["norm, rate", "validation", "test", "diverged", ""], rows, title="Every rate, after the last epoch")


def _draw(figure: Figure, runs: Runs, chosen: Runs, target: float) -> None:
    from netdeconv.lab.plots import tidy

    figure.set_size_inches(12.5, 4.1)
    loss, accuracy, rates = figure.subplots(1, 3)
    for norm in METHODS:
        name, style = METHODS[norm], NORMS[norm].style
        line(loss, at_epochs(chosen[norm], "train/loss"), f"{name}, training", style)
        line(loss, at_epochs(chosen[norm], "test/loss"), f"{name}, test", {**style, "linestyle": "--", "mfc": "white"})
        label = f"{name}, rate {chosen[norm][0]['rate']:g}"
        line(accuracy, at_epochs(chosen[norm], "test/accuracy"), label, style)
        line(rates, at_rates(runs[norm], _CHOICE), name, style)
    accuracy.axhline(100 * target, color="0.45", linewidth=0.9, linestyle=":")
    loss.set(yscale="log", xlabel="epoch", ylabel="cross entropy (nats)")
    accuracy.set(xlabel="epoch", ylabel="test accuracy (%)")
    rates.set(xscale="log", xlabel="learning rate", ylabel="validation accuracy (%)")
    rates.set_xticks(list(by_rate(runs["bn"])), [f"{rate:g}" for rate in by_rate(runs["bn"])])
    for axes in (loss, accuracy, rates):
        axes.legend(fontsize=8)
        tidy(axes)


EXPERIMENT = Experiment(
    name="demo",
    claim="Network deconvolution needs fewer epochs than batch normalisation.",
    source="abstract",
    sizes={
        "smoke": DemoSettings(epochs=2, seeds=1, rates=(0.1, 0.3)),
        "small": DemoSettings(),
        "paper": DemoSettings(epochs=20, seeds=5),
    },
    run=run,
    present=present,
    code=("lab/experiments/demo.py", *CODE),
)
