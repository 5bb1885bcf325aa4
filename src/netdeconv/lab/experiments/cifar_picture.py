"""Test accuracy by learning rate, or by epoch, a panel for each network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from netdeconv.lab.experiments.comparison import at_epochs, at_rates, best, line
from netdeconv.lab.norms import NORMS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

_MOST_COLUMNS = 5


Runs = Sequence[Mapping[str, Any]]


def draw(figure: Figure, *, title: str, panels: Mapping[str, Mapping[str, Runs]], by_epoch: bool = False) -> None:
    """Fill an empty figure.

    Args:
        figure: its size is set.
        title: stands above all panels.
        panels: by title: the runs of one network by norm.
        by_epoch: along the epochs, every norm at its best rate, and not along the rates.
    """
    rows = math.ceil(len(panels) / _MOST_COLUMNS)
    columns = math.ceil(len(panels) / rows)
    figure.set_size_inches(max(5.5, 2.5 * columns), 2.2 * rows + 1.1)
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    rates = sorted({run["rate"] for norms in panels.values() for runs in norms.values() for run in runs})
    for place, (name, norms) in enumerate(panels.items()):
        axes = grid.flat[place]
        for norm, runs in norms.items():
            values = at_epochs(best(runs), "test/accuracy") if by_epoch else at_rates(runs)
            line(axes, values, NORMS[norm].label, NORMS[norm].style)
        axes.set_title(name, fontsize=9)
        if place + columns >= len(panels):  # nothing below it
            axes.set_xlabel("epoch" if by_epoch else "learning rate", fontsize=8)
        if place % columns == 0:
            axes.set_ylabel("test accuracy, %", fontsize=8)
        if by_epoch:
            _ticks_at_epochs(axes, max(run["epochs"] for runs in norms.values() for run in runs))
        else:
            _ticks_at(axes, rates)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    shown = {label: drawn for axes in grid.flat for drawn, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown), fontsize=8, frameon=False)


def _ticks_at_epochs(axes: Axes, epochs: int) -> None:
    from matplotlib.ticker import MaxNLocator

    from netdeconv.lab.plots import tidy

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(0.7, epochs + 0.3)
    axes.tick_params(labelsize=7, labelbottom=True)
    tidy(axes)


def _ticks_at(axes: Axes, rates: Sequence[float]) -> None:
    """A logarithmic axis with the tried rates on it and no others."""
    from matplotlib.ticker import NullLocator

    from netdeconv.lab.plots import tidy

    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(rates[0] / 1.3, rates[-1] * 1.3)
    axes.tick_params(labelsize=7, labelbottom=True)
    if _crowded(rates):
        axes.tick_params(axis="x", labelrotation=90)
    tidy(axes)


def _crowded(rates: Sequence[float]) -> bool:
    """Whether labels side by side would touch: some neighbours are closer than a sixth of the axis."""
    gaps = [math.log(b / a) for a, b in itertools.pairwise(rates)]
    return bool(gaps) and min(gaps) < sum(gaps) / 6
