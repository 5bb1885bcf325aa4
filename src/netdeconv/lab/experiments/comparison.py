"""Runs beside each other: grouped by rate, each method at its best one, as cells and curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from netdeconv.lab.norms import NORMS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "METHODS",
    "accuracy_cell",
    "at_epochs",
    "at_rates",
    "best",
    "best_rate",
    "by_rate",
    "finals",
    "grouped",
    "line",
    "loss_cell",
    "percent",
    "rates_cell",
    "tuned",
]

METHODS = {norm: str(NORMS[norm]) for norm in ("bn", "nd")}  # compared in most experiments, in full
ACCURACY = "test/accuracy"
_LARGE = 1e4  # a loss of a training that has diverged, or nearly

Run = Mapping[str, Any]


def grouped(runs: Iterable[Run], key: Callable[[Run], Any]) -> dict[Any, list[Run]]:
    """Runs by a key, in the order of their firsts."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def by_rate(runs: Iterable[Run]) -> dict[float, list[Run]]:
    """Runs of one method by their rate, the lowest first."""
    return dict(sorted(grouped(runs, lambda run: run["rate"]).items()))


def finals(runs: Iterable[Run], logged: str = ACCURACY) -> list[float]:
    """What each run has logged last, of a share of 1, in per cent; 0 where it is not finite."""
    return [100 * (run["curves"][logged][-1] or 0.0) for run in runs]


def best_rate(runs: Iterable[Run], logged: str = ACCURACY) -> float:
    """The rate with the highest mean; of equal ones that with the lowest loss on the same part."""
    loss = f"{logged.partition('/')[0]}/loss"

    def merit(rate: float) -> tuple[float, float]:
        same = groups[rate]
        losses = [run["curves"].get(loss, [None])[-1] for run in same]
        mean = -math.inf if None in losses else -statistics.fmean(losses)
        return round(statistics.fmean(finals(same, logged)), 7), mean

    groups = by_rate(runs)
    return max(groups, key=merit)


def best(runs: Sequence[Run], logged: str = ACCURACY) -> list[Run]:
    """The runs at the best rate."""
    return by_rate(runs)[best_rate(runs, logged)]


def tuned(runs: Iterable[Run]) -> list[Run]:
    """The runs at the rate that is best with one seed, the lowest that every rate has.

    So further seeds, which the best rate alone is given, do not change which one that is.
    """
    rates = by_rate(runs)
    seed = min(set.intersection(*({run["seed"] for run in same} for same in rates.values())))
    return rates[best_rate(run for same in rates.values() for run in same if run["seed"] == seed)]


def percent(values: Sequence[float]) -> str:
    """Mean and, of several values, their standard deviation; nothing of none."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread} %"


def accuracy_cell(runs: Sequence[Run], logged: str = ACCURACY) -> str:
    """The mean over seeds of what was logged last, see :func:`percent`."""
    return percent(finals(runs, logged))


def loss_cell(runs: Sequence[Run], logged: str = "train/loss") -> str:
    """The mean over seeds of the last loss."""
    losses = [run["curves"][logged][-1] for run in runs]
    if None in losses:
        return "diverged"
    mean = statistics.fmean(losses)
    return f"{mean:.3f}" if abs(mean) < _LARGE else f"{mean:.1e}"


def rates_cell(runs: Sequence[Run]) -> str:
    """Every rate: its accuracy, and the rate in brackets."""
    return ", ".join(f"{accuracy_cell(same)} ({rate:g})" for rate, same in by_rate(runs).items())


def at_epochs(runs: Sequence[Run], logged: str) -> dict[float, list[float]]:
    """What was logged, seed by seed, by epoch; losses as they are, shares in per cent, numbers not finite left out."""
    factor = 1.0 if logged.endswith("/loss") else 100.0
    curves = [run["curves"][logged] for run in runs]
    found = {k: [factor * v for v in at if v is not None] for k, at in enumerate(zip(*curves, strict=True), 1)}
    return {epoch: values for epoch, values in found.items() if values}


def at_rates(runs: Iterable[Run], logged: str = ACCURACY) -> dict[float, list[float]]:
    """What was logged last, seed by seed, by rate."""
    return {rate: finals(same, logged) for rate, same in by_rate(runs).items()}


def line(axes: Axes, values: Mapping[Any, Sequence[float]], label: str, style: Mapping[str, Any]) -> None:
    """Mean over seeds, and from the worst to the best of them."""
    means = list(map(statistics.fmean, values.values()))
    axes.plot(list(values), means, label=label, markersize=4, linewidth=1.4, **style)
    lowest, highest = (list(map(end, values.values())) for end in (min, max))
    axes.vlines(list(values), lowest, highest, color=style["color"], linewidth=1)
