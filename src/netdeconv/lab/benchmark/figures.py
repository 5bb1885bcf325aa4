"""Pictures of the benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from netdeconv.lab.methods import Method
from netdeconv.lab.norms import NORMS
from netdeconv.lab.plots import LINES, tidy

__all__ = ["memory_figure", "moments_figure", "root_figure", "scaling_figure", "step_figure"]

_DPI = 130


def step_figure(result: Mapping[str, Any], title: str) -> Figure:
    """Bars of time, relative to BatchNorm, with 95 % intervals; and of memory where it was measured."""
    parts = [("Training step", "training"), ("Evaluation", "evaluation")]
    memory = result.get("memory")
    width = 2.2 + 0.5 * len(result["training"]["candidates"])
    figure = Figure(figsize=(width * (2 + bool(memory)), 3.6), dpi=_DPI, layout="constrained")
    panels = figure.subplots(1, 2 + bool(memory), squeeze=False)[0]
    for axes, (name, part) in zip(panels, parts, strict=False):
        ratios = result[part]["ratios"]
        kinds = list(result[part]["candidates"])
        found = [ratios.get(f"{kind}/bn", {"value": 1.0, "interval": [1.0, 1.0]}) for kind in kinds]
        reach = [[abs(ratio["interval"][side] - ratio["value"]) for ratio in found] for side in (0, 1)]
        _bars(axes, kinds, [ratio["value"] for ratio in found], reach)
        axes.set_title(name)
    if memory:
        _memory_bars(panels[-1], memory, "peak", "Peak memory of training")
    panels[0].set_ylabel("relative to BatchNorm")
    figure.suptitle(title, fontsize=10)
    return figure


def memory_figure(result: Mapping[str, Any], title: str) -> Figure:
    """Bars of peak memory and of what is kept for backward, relative to BatchNorm."""
    figure = Figure(figsize=(8.4, 3.6), dpi=_DPI, layout="constrained")
    panels = figure.subplots(1, 2)
    _memory_bars(panels[0], result["memory"], "peak", "Peak memory of training")
    _memory_bars(panels[1], result["memory"], "saved", "Kept for backward")
    panels[0].set_ylabel("relative to BatchNorm")
    figure.suptitle(title, fontsize=10)
    return figure


def _memory_bars(axes: Axes, memory: Mapping[str, Any], what: str, title: str) -> None:
    _bars(axes, list(memory), [one[f"{what}_ratio"] or 0.0 for one in memory.values()])
    axes.set_title(title)


def _bars(axes: Axes, kinds: Sequence[str], values: Sequence[float], reach: Any = None) -> None:
    names = [Method.named(kind).label.replace(" ", "\n") for kind in kinds]
    bars = axes.bar(names, values, color=[Method.named(kind).style["color"] for kind in kinds], yerr=reach, capsize=3)
    axes.bar_label(bars, labels=[f"{value:.2f}" for value in values], padding=2, fontsize=9,
                   bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5}, zorder=3)  # fmt: skip
    axes.margins(y=0.12)
    axes.axhline(1, color="0.3", linewidth=0.9, linestyle=":")
    axes.tick_params(axis="x", labelsize=8)
    tidy(axes)


def root_figure(result: Mapping[str, Any], title: str) -> Figure:
    """Time by size, and gain error and residual by condition number at the largest size; a row per number of steps."""
    counts = sorted({row["num_iters"] for row in result["rows"]})
    figure = Figure(figsize=(12.5, 3.7 * len(counts)), dpi=_DPI, layout="constrained")
    for panels, num_iters in zip(figure.subplots(len(counts), 3, squeeze=False), counts, strict=True):
        rows = [row for row in result["rows"] if row["num_iters"] == num_iters]
        largest = max(row["size"] for row in rows)
        for style, solver in zip(LINES, dict.fromkeys(row["solver"] for row in rows), strict=False):
            mine = [row for row in rows if row["solver"] == solver]
            panels[0].plot([row["size"] for row in mine], [1000 * row["time"]["step"] for row in mine], label=solver,
                           markersize=4, **style)  # fmt: skip
            found = next(row["errors"] for row in mine if row["size"] == largest)
            for axes, what in ((panels[1], "gain"), (panels[2], "residual")):
                axes.plot([e["condition"] for e in found], [max(e[what], 1e-16) for e in found], markersize=4, **style)
        panels[0].set(xlabel="size n", ylabel="time (ms)", title=f"{num_iters} steps: time")
        panels[1].set(ylabel="largest relative error", title=f"gain against float64 steps, n = {largest}")
        panels[2].set(ylabel="|D C D - I|", title=f"whitening residual, n = {largest}")
        panels[0].set_xticks(sorted({row["size"] for row in rows}))
        panels[0].legend(fontsize=8, frameon=False)
        for axes in panels:
            axes.set(xscale="log", yscale="log")
            axes.yaxis.set_minor_formatter(NullFormatter())
            tidy(axes)
        for axes in panels[1:]:
            axes.set_xlabel("condition number")
        sizes = sorted({row["size"] for row in rows})
        panels[0].set_xticks(sizes, [str(size) for size in sizes])
        panels[0].xaxis.set_minor_formatter(NullFormatter())
    figure.suptitle(title, fontsize=10)
    return figure


def moments_figure(result: Mapping[str, Any], title: str) -> Figure:
    """Error of covariance and root against time, a panel per shape of the map."""
    shapes = list(dict.fromkeys(row["shape"] for row in result["rows"]))
    figure = Figure(figsize=(3.6 * len(shapes), 3.9), dpi=_DPI, layout="constrained")
    for axes, shape in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes, strict=True):
        rows = [row for row in result["rows"] if row["shape"] == shape]
        for what, mark in (("cov", "o"), ("root", "s")):
            for kind, colour in (("spread", LINES[1]["color"]), ("corner", LINES[0]["color"])):
                mine = [row for row in rows if row["sampling"].startswith(kind)]
                axes.plot([1000 * row["time"]["step"] for row in mine],
                          [max(100 * row["errors"][what], 0.1) for row in mine], color=colour, marker=mark,
                          linestyle="-" if what == "root" else ":", markersize=4, label=f"{kind}, {what}")  # fmt: skip
        whole = 1000 * rows[0]["time"]["step"]
        axes.axvline(whole, color="0.45", linewidth=0.9, linestyle=":", label="time of all positions")
        axes.set(xscale="log", yscale="log", xlabel="time (ms)", title=f"maps {shape}")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        tidy(axes)
    figure.axes[0].set_ylabel("relative error (%), 0.1 if less")
    figure.axes[0].legend(fontsize=7, frameon=False)
    figure.suptitle(title, fontsize=10)
    return figure


def scaling_figure(result: Mapping[str, Any], title: str) -> Figure:
    """Share of the step that is not the convolution, against channels, batch size and map size."""
    names = {"channels": "channels", "batch": "batch size", "size": "map size"}
    figure = Figure(figsize=(12.5, 3.9), dpi=_DPI, layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (axis, name) in zip(panels, names.items(), strict=True):
        mine = sorted((p for p in result["points"] if p["axis"] == axis), key=lambda point: point[axis])
        at = [point[axis] for point in mine]
        for which, key, label in (("default", "nd", "whitening"), ("batchnorm", "bn", "batch normalisation")):
            shares = [point["share"][which] for point in mine]
            low, high = ([100 * share["interval"][side] for share in shares] for side in (0, 1))
            style = NORMS[key].style
            axes.plot(at, [100 * share["value"] for share in shares], markersize=4, label=label, **style)
            axes.fill_between(at, low, high, color=style["color"], alpha=0.16, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(at, [str(value) for value in at])
        axes.axhline(0, color="0.45", linewidth=0.9)
        others = ", ".join(f"{names[other]} {mine[0][other]}" for other in names if other != axis) if mine else ""
        axes.set(xlabel=name, title=others)
        axes.title.set_fontsize(9)
        tidy(axes)
    panels[0].set_ylabel("share of the training step (%)")
    panels[0].legend(fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    return figure
