"""Test accuracy by learning rate, a panel for each network."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from netdeconv.lab.experiments.trials import NAMES, accuracies, by_rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

_MOST_COLUMNS = 5


def draw(figure: Figure, *, title: str, panels: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> None:
    """Fill an empty figure.

    Args:
        figure: its size is set.
        title: stands above all panels.
        panels: by title: the runs of one network by norm.
    """
    from netdeconv.lab.plots import styles_of_norms

    rows = math.ceil(len(panels) / _MOST_COLUMNS)
    columns = math.ceil(len(panels) / rows)
    figure.set_size_inches(max(5.5, 2.5 * columns), 2.2 * rows + 1.1)
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    styles = styles_of_norms(dict.fromkeys(norm for runs in panels.values() for norm in runs))
    rates = sorted({run["rate"] for norms in panels.values() for runs in norms.values() for run in runs})
    for place, (name, norms) in enumerate(panels.items()):
        axes = grid.flat[place]
        for norm, runs in norms.items():
            _line(axes, runs, label=NAMES.get(norm, norm), style=styles[norm])
        axes.set_title(name, fontsize=9)
        if place + columns >= len(panels):  # nothing below it
            axes.set_xlabel("learning rate", fontsize=8)
        if place % columns == 0:
            axes.set_ylabel("test accuracy, %", fontsize=8)
        _ticks_at(axes, rates)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    shown = {label: line for axes in grid.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown), fontsize=8, frameon=False)


def _line(axes: Axes, runs: Sequence[Mapping[str, Any]], *, label: str, style: Mapping[str, Any]) -> None:
    """Mean over seeds, and from the worst to the best of them."""
    groups = sorted(by_rate(runs).items())
    rates = [rate for rate, _ in groups]
    values = [accuracies(same) for _, same in groups]
    axes.plot(rates, list(map(statistics.fmean, values)), label=label, markersize=4, linewidth=1.4, **style)
    axes.vlines(rates, list(map(min, values)), list(map(max, values)), color=style["color"], linewidth=1)


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
