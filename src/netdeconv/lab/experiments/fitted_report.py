"""Tables and curves of trainings by ``netdeconv fit``."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from netdeconv.lab.experiments.experiment import Picture, Presentation
from netdeconv.lab.experiments.fitted import NORMS
from netdeconv.lab.report import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Measure", "present_fits"]


@dataclasses.dataclass(frozen=True)
class Measure:
    """What is compared: a share of 1, the larger the better."""

    logged: str
    title: str


def present_fits(
    result: Mapping[str, Any], measure: Measure, *, note: str, name: str, published: Sequence[Table] = ()
) -> Presentation:
    """A row for every method and rate, and the curves.

    Args:
        result: of :func:`netdeconv.lab.experiments.fitted.compared`.
        measure: what to compare.
        note: how the numbers came about.
        name: of the picture's file.
        published: tables to show beside.
    """
    groups = _grouped(result["runs"])
    figure = Picture(
        f"{name}-curves",
        f"Training loss and {measure.title} by epoch, mean over the seeds.",
        lambda figure: _draw(figure, groups, measure),
    )
    return Presentation([_table(groups, measure, note), *published], [figure])


Group = tuple[str, float]
_LARGE = 1e4  # a loss of a training that has diverged


def _grouped(runs: Sequence[Mapping[str, Any]]) -> dict[Group, list[Mapping[str, Any]]]:
    """The trainings by norm and rate."""
    groups: dict[Group, list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["norm"], run["rate"]), []).append(run)
    return groups


def _last(runs: Sequence[Mapping[str, Any]], logged: str) -> list[float]:
    """The last number of each training; a loss that is not finite was logged as such and makes none."""
    return [value for run in runs if (value := _of(run["epochs"][-1], logged)) is not None]


def _of(row: Mapping[str, Any], logged: str) -> float | None:
    value = row.get(logged)
    return None if value is None or value != value else float(value)


def _table(groups: Mapping[Group, Sequence[Mapping[str, Any]]], measure: Measure, note: str) -> Table:
    part = measure.logged.partition("/")[0]
    others = sorted(
        {key for runs in groups.values() for key in runs[0]["epochs"][-1] if key.startswith(f"{part}/")}
        - {measure.logged, f"{part}/loss"}
    )
    rows = [
        [
            NORMS[norm],
            f"{rate:g}",
            str(len(runs)),
            _percent(_last(runs, measure.logged)),
            *(_percent(_last(runs, key)) for key in others),
            _number(_last(runs, f"{part}/loss")),
            _number(_last(runs, "train/loss")),
        ]
        for (norm, rate), runs in groups.items()
    ]
    names = [key.partition("/")[2].replace("_", " ") for key in others]
    columns = ["method", "rate", "seeds", measure.title, *names, f"{part} loss", "training loss"]
    return Table(columns, rows, title="After the last epoch", note=note)


def _percent(values: Sequence[float]) -> str:
    if not values:
        return "diverged"
    around = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{around} %"


def _number(values: Sequence[float]) -> str:
    if not values:
        return "diverged"
    mean = statistics.fmean(values)
    return f"{mean:.3f}" if abs(mean) < _LARGE else f"{mean:.1e}"


def _draw(figure: Figure, groups: Mapping[Group, Sequence[Mapping[str, Any]]], measure: Measure) -> None:
    from netdeconv.lab.plots import LINES, tidy

    figure.set_size_inches(9.5, 3.9)
    loss, score = figure.subplots(1, 2)
    for ((norm, rate), runs), style in zip(groups.items(), LINES * len(groups), strict=False):
        for axes, logged, factor in ((loss, "train/loss", 1.0), (score, measure.logged, 100.0)):
            by_epoch: dict[float, list[float]] = {}
            for run in runs:
                for row in run["epochs"]:
                    if (value := _of(row, logged)) is not None:
                        by_epoch.setdefault(row["epoch"], []).append(factor * value)
            means = [statistics.fmean(values) for values in by_epoch.values()]
            label = f"{NORMS[norm]}, rate {rate:g}"
            axes.plot(list(by_epoch), means, label=label, markersize=4, linewidth=1.4, **style)
    loss.set(xlabel="epoch", ylabel="training loss")
    score.set(xlabel="epoch", ylabel=f"{measure.title} (%)")
    for axes in (loss, score):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=8, frameon=False)
        tidy(axes)
