"""Pictures of results, drawn without a display and without touching matplotlib's global state."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, ScalarFormatter
from torch import Tensor

from netdeconv.inspect import centre_filters, mean_abs_offdiagonal

__all__ = [
    "LINES",
    "STYLES",
    "correlation_figure",
    "curves_figure",
    "draw_layers",
    "draw_matrices",
    "filters_figure",
    "history_figure",
    "png",
    "styles_of_norms",
    "tidy",
]

# Okabe and Ito's colours stay apart for colour-blind readers; marker and dash tell them apart in grey.
STYLES: dict[str, dict[str, Any]] = {
    "bn": {"color": "#0072B2", "marker": "o"},
    "nd": {"color": "#D55E00", "marker": "s"},
}
# Lines that stay apart in one picture, in the same colours.
LINES: tuple[dict[str, Any], ...] = (
    {"color": "#000000", "marker": "o", "linestyle": "-"},
    {"color": "#D55E00", "marker": "s", "linestyle": "-"},
    {"color": "#56B4E9", "marker": "^", "linestyle": "--"},
    {"color": "#009E73", "marker": "D", "linestyle": "--"},
    {"color": "#CC79A7", "marker": "v", "linestyle": ":"},
    {"color": "#7F7F7F", "marker": "x", "linestyle": ":"},
)
_PROFILE_COLOURS = ("#000000", "#009E73", "#CC79A7")
_COLOURS = ("#0072B2", "#D55E00", *_PROFILE_COLOURS)
_RING: dict[str, Any] = {"markersize": 11, "markerfacecolor": "none", "markeredgewidth": 1.5, "linestyle": "none"}
_DPI = 130
_AROUND_EPOCHS = 0.3  # left and right of the first and the last one
# Numbers of a power of ten that get a tick on a logarithmic axis, by the largest over the smallest one on it.
_STEPS = ((6.0, (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)), (200.0, (1.0, 2.0, 5.0)), (float("inf"), (1.0,)))


def styles_of_norms(norms: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A line for each norm; batch normalisation and network deconvolution look alike in all pictures."""
    taken = {style["color"] for style in STYLES.values()}
    others = itertools.cycle(line for line in LINES if line["color"] not in taken)
    return {norm: STYLES[norm] if norm in STYLES else next(others) for norm in norms}


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def curves_figure(methods: Mapping[str, Mapping[str, Any]], target: float) -> Figure:
    """Loss and accuracy by epoch at each method's chosen rate, and validation accuracy by learning rate.

    Lines are means over seeds, bands reach from the worst to the best seed.

    Args:
        methods: by short name: ``name``, ``rate``, ``curves`` (logged name -> one list of epochs per seed),
            ``grid`` (one entry per learning rate: ``rate``, ``validation_accuracy`` per seed).
        target: accuracy to draw a line at, 0 to 1.
    """
    figure = Figure(figsize=(12.5, 4.1), dpi=_DPI, layout="constrained")
    loss, accuracy, rates = figure.subplots(1, 3)
    lowest = 1.0
    worst = 1.0
    for key, method in methods.items():
        style, name = STYLES[key], method["name"]
        curves = method["curves"]
        _band(loss, curves["train/loss"], style, label=f"{name}, training")
        _band(loss, curves["test/loss"], {**style, "linestyle": "--", "mfc": "white"}, label=f"{name}, test")
        _band(accuracy, 100 * _array(curves["test/accuracy"]), style, label=f"{name}, rate {method['rate']:g}")
        lowest = min(lowest, float(np.nanmin(_array(curves["test/accuracy"]))))
        _rates(rates, method, style)
        worst = min(worst, *(min(entry["validation_accuracy"]) for entry in method["grid"]))
    rates.plot([], [], "o", **_RING, color="0.4", label="chosen")
    epochs = max(_array(m["curves"]["train/loss"]).shape[1] for m in methods.values())
    for axes in (loss, accuracy):
        axes.set_xlabel("epoch")
        axes.set_xticks(np.unique(np.linspace(1, epochs, min(epochs, 8)).round().astype(int)))
    loss.set(yscale="log", ylabel="cross entropy (nats)", title="Loss")
    accuracy.axhline(100 * target, color="0.45", linewidth=0.9, linestyle=":")
    floor = min(100 * lowest, 100 * target)
    accuracy.set(ylabel="test accuracy (%)", title="Accuracy on the test split")
    accuracy.set_ylim(max(0.0, floor - 0.08 * (100 - floor) - 0.2), 100.2)
    rates.set(xscale="log", xlabel="learning rate", ylabel="validation accuracy (%)")
    rates.set_ylim(max(0.0, 100 * worst - 0.25 * (100 - 100 * worst)), 100 + 0.03 * (100 - 100 * worst))
    rates.set_title("After the last epoch, by learning rate")
    ticks = sorted({entry["rate"] for m in methods.values() for entry in m["grid"]})
    rates.set_xticks(ticks)
    rates.xaxis.set_major_formatter(ScalarFormatter())
    rates.xaxis.set_minor_formatter(NullFormatter())
    rates.set_xticklabels([f"{tick:g}" for tick in ticks])
    for axes, place in ((loss, "best"), (accuracy, "lower right"), (rates, "lower left")):
        axes.legend(loc=place, fontsize=8, frameon=False)
        tidy(axes)
    return figure


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


def filters_figure(images: Tensor, filters: Mapping[str, Tensor]) -> Figure:
    """Whitening filters of the centre pixel, one column per way of computing the root, and their profiles.

    Args:
        images: ``(N, 3, H, W)``, values 0 to 1: what the filters were computed from, shown on the left.
        filters: title -> ``(3*K, 3, k, k)`` from :func:`netdeconv.inspect.whitening_filters`.
    """
    columns = len(filters)
    figure = Figure(figsize=(3.2 + 1.75 * columns + 3.9, 5.4), dpi=_DPI, layout="constrained")
    parts: Any = figure.subfigures(1, 3, width_ratios=(3.0, 1.75 * columns, 3.9))
    left, middle, right = parts
    for axes, image in zip(np.atleast_1d(left.subplots(len(images), 1)), images, strict=True):
        axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
        axes.set_axis_off()
    left.suptitle("Photographs", fontsize=10)
    grid = middle.subplots(3, columns, squeeze=False)
    profile = right.subplots()
    side = next(iter(filters.values())).shape[-1]
    offsets = np.arange(side) - side // 2
    for column, (title, every) in enumerate(filters.items()):
        centre = centre_filters(every)
        grid[0, column].set_title(f"{title}\ngreen peak {float(centre[1].max()):.1f}", fontsize=9)
        for channel, colour in enumerate(("red", "green", "blue")):
            axes, own = grid[channel, column], centre[channel]
            axes.imshow((0.5 + 0.5 * own / own.abs().max()).permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if column == 0:
                axes.set_ylabel(colour, fontsize=9)
        line = centre[1, 1, side // 2] / centre[1, 1, side // 2, side // 2]
        style = {
            "color": _PROFILE_COLOURS[column % 3],
            "marker": "os^"[column % 3],
            "linestyle": ("-", "--", ":")[column % 3],
        }
        profile.plot(offsets, line.numpy(), label=title.replace("\n", " "), markersize=5, **style)
    middle.suptitle("Filter of the centre pixel; grey is 0, each scaled to its peak", fontsize=10)
    profile.axhline(0, color="0.45", linewidth=0.9)
    profile.set(xlabel="distance from the centre (pixels)", ylabel="green weight (share of the peak)")
    profile.set_title("Row through the green filter", fontsize=10)
    profile.legend(fontsize=8, frameon=False)
    tidy(profile)
    return figure


def correlation_figure(rows: Mapping[str, tuple[int, Mapping[str, Tensor]]]) -> Figure:
    """Absolute correlation matrices: one row per kind of image, one column per treatment.

    Args:
        rows: title of the row -> (channels, {title of the column: correlation matrix ``(C*K, C*K)``}).
    """
    columns = max(len(matrices) for _, matrices in rows.values())
    figure = Figure(figsize=(3.3 * columns + 1.3, 3.45 * len(rows)), dpi=_DPI, layout="constrained")
    drawn = [
        [(f"{title}\nmean |off-diagonal| {mean_abs_offdiagonal(corr):.3f}", corr) for title, corr in matrices.items()]
        for _, matrices in rows.values()
    ]
    for row, (label, (channels, matrices)) in zip(draw_matrices(figure, drawn), rows.items(), strict=True):
        for axes, corr in zip(row, matrices.values(), strict=True):
            axes.set_xlabel("feature (channel, then tap)" if channels > 1 else "feature (tap)", fontsize=8)
            taps = len(corr) // channels
            if channels == 3:
                axes.set_xticks([taps * c + (taps - 1) / 2 for c in range(3)], ["red", "green", "blue"])
                axes.set_yticks([taps * c + (taps - 1) / 2 for c in range(3)], ["red", "green", "blue"])
                axes.tick_params(length=0, labelsize=8)
        row[0].set_ylabel(label, fontsize=10)
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


def _array(curves: Sequence[Sequence[float | None]]) -> np.ndarray:
    """One row per seed; ``None``, a number that was not finite, becomes NaN."""
    return np.array([[np.nan if v is None else v for v in curve] for curve in curves], dtype=float)


def _band(axes: Axes, curves: Any, style: Mapping[str, Any], *, label: str) -> None:
    values = _array(curves) if not isinstance(curves, np.ndarray) else curves
    epochs = np.arange(1, values.shape[1] + 1)
    axes.plot(epochs, values.mean(0), markersize=4, linewidth=1.6, label=label, **style)
    if len(values) > 1:
        axes.fill_between(epochs, values.min(0), values.max(0), color=style["color"], alpha=0.16, linewidth=0)


def _rates(axes: Axes, method: Mapping[str, Any], style: Mapping[str, Any]) -> None:
    tried = [entry["rate"] for entry in method["grid"]]
    values = 100 * _array([entry["validation_accuracy"] for entry in method["grid"]])
    axes.plot(tried, values.mean(1), markersize=4, linewidth=1.6, label=method["name"], **style)
    if values.shape[1] > 1:
        axes.fill_between(tried, values.min(1), values.max(1), color=style["color"], alpha=0.16, linewidth=0)
    chosen = values.mean(1)[tried.index(method["rate"])]
    axes.plot([method["rate"]], [chosen], "o", **_RING, color=style["color"])


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
