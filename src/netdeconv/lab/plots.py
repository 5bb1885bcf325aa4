"""Pictures of results, drawn without a display and without touching matplotlib's global state."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

__all__ = [
    "LINES",
    "draw_layers",
    "draw_matrices",
    "history_figure",
    "png",
    "tidy",
]

# Lines that stay apart in one picture, in the colours of the norms.
LINES: tuple[dict[str, Any], ...] = (
    {"color": "#000000", "marker": "o", "linestyle": "-"},
    {"color": "#D55E00", "marker": "s", "linestyle": "-"},
    {"color": "#56B4E9", "marker": "^", "linestyle": "--"},
    {"color": "#009E73", "marker": "D", "linestyle": "--"},
    {"color": "#CC79A7", "marker": "v", "linestyle": ":"},
    {"color": "#7F7F7F", "marker": "x", "linestyle": ":"},
)
_COLOURS = ("#0072B2", "#D55E00", "#000000", "#009E73", "#CC79A7")
_DPI = 130
_AROUND_EPOCHS = 0.3  # left and right of the first and the last one
# Numbers of a power of ten that get a tick on a logarithmic axis, by the largest over the smallest one on it.
_STEPS = ((6.0, (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)), (200.0, (1.0, 2.0, 5.0)), (float("inf"), (1.0,)))


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def history_figure(rows: Sequence[Mapping[str, float]], title: str) -> Figure:
    """Losses and measures of one training, by epoch.

    Args:
        rows: one mapping per epoch: ``epoch``, and logged numbers named ``part/measure``.
        title: of the picture.
    """
    logged = dict.fromkeys(name for row in rows for name in row if "/" in name)
    losses = [name for name in logged if name.endswith("/loss")]
    measures = [name for name in logged if name not in losses]
    figure = Figure(figsize=(9.5, 4.0), dpi=_DPI, layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axes, names, heading in zip(figure.subplots(1, 2), (losses, measures), ("Loss", "Measures"), strict=True):
        for i, name in enumerate(names):
            epochs, values = zip(*((row["epoch"], row[name]) for row in rows if name in row), strict=True)
            style = {"color": _COLOURS[i % len(_COLOURS)], "marker": "os^Dv"[i % 5]}
            axes.plot(epochs, values, label=name, markersize=4, linewidth=1.4, **style)
        kinds = dict.fromkeys(name.partition("/")[2].replace("_", " ") for name in names)
        axes.set(xlabel="epoch", ylabel=", ".join(kinds), title=heading)
        if names:
            axes.legend(fontsize=8, frameon=False)
        tidy(axes)
    return figure


def draw_matrices(figure: Figure, rows: Sequence[Sequence[tuple[str, Any] | None]]) -> Any:
    """Fill a figure with correlation matrices by their absolute values; returns the grid of axes.

    Args:
        figure: empty.
        rows: as many places each: title and matrix, or ``None`` for a place that stays empty.
    """
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    picture: Any = None
    for axes, place in zip(grid.flat, itertools.chain.from_iterable(rows), strict=True):
        if place is None:
            axes.set_axis_off()
            continue
        title, matrix = place
        picture = axes.imshow(np.abs(np.asarray(matrix)), vmin=0, vmax=1, cmap="cividis", interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=7)
    figure.colorbar(picture, ax=grid, shrink=0.6, label="|correlation|")
    return grid


def draw_layers(axes: Axes, names: Sequence[str], lines: Mapping[str, Sequence[float]], **labels: Any) -> None:
    """Fill axes with numbers of layers: a line each, names of the layers below, as many as there is room for.

    Args:
        axes: empty.
        names: of the layers, in their order.
        lines: a number for every layer, by the line's name.
        labels: of the axes, their scales and limits.
    """
    for (label, values), style in zip(lines.items(), LINES, strict=False):
        axes.plot(values, label=label, linewidth=1.4, markersize=4, **style)
    step = -(-len(names) // 16)
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=35, ha="right", fontsize=8)
    axes.set(**labels)
    axes.legend(fontsize=8)
    tidy(axes)


def tidy(axes: Axes) -> None:
    """What all pictures have in common, for axes that are drawn and labelled.

    A light grid behind the lines, no frame above and to the right; plain numbers on logarithmic axes; whole numbers on
    an axis of epochs, also for a single one; a legend that lines do not strike through.
    """
    axes.grid(True, color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        if axis.get_scale() in ("log", "symlog"):
            _plain_numbers(axis, limits)
    if axes.get_xlabel() == "epoch":
        low, high = axes.dataLim.intervalx
        margin = max(_AROUND_EPOCHS, 0.03 * (high - low))
        if np.isfinite(low):  # something is drawn
            axes.set_xlim(low - margin, high + margin)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    if (legend := axes.get_legend()) is not None:
        legend.set_frame_on(True)
        legend.get_frame().set(alpha=0.85, edgecolor="none", facecolor="white")


def _plain(value: float) -> str:
    """0.01, 2, 10000; beyond that 1e-4 and 1e5, which take less room."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:g}"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def _plain_numbers(axis: Axis, limits: tuple[float, float]) -> None:
    """0.5, 1, 2 and not 5 x 10^-1, 10^0, 2 x 10^0; more of them where the axis has few powers of ten."""
    axis.set_minor_formatter(NullFormatter())
    if isinstance(axis.get_major_locator(), FixedLocator):  # ticks of the picture's own choice
        return
    axis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))
    low, high = sorted(limits)
    if axis.get_scale() == "log" and getattr(axis.get_transform(), "base", 10) == 10 and low > 0:
        steps = next(steps for most, steps in _STEPS if high / low <= most)
        axis.set_major_locator(LogLocator(subs=steps, numticks=12))
