"""Table and pictures of the experiment on whitening filters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from netdeconv.lab.experiments.experiment import Picture, Presentation
from netdeconv.lab.report import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ROOTS", "present"]

ROOTS = {
    "exact": "converged, eps 1e-5",
    "steps15": "15 steps",
    "steps5": "5 steps, as published",
    "zca": "raw ZCA, eps 0",
}
_SOURCES = {"photographs": "photographs", "cifar10": "CIFAR-10"}
def present(result: Mapping[str, Any]) -> Presentation:
    """What came out."""
    entries = result["filters"]
    figures = []
    for source in dict.fromkeys(entry["source"] for entry in entries):
        for colours in ("colour", "grey"):
            shown = [one for one in entries if one["source"] == source and one["colours"] == colours]
            figures.append(
                Picture(
                    f"filters-{source}-{colours}",
                    f"Filters of the centre pixel that whiten {_SOURCES[source]} in {colours}: the weights of its own "
                    "channel"
                    + (" (green)" if colours == "colour" else "")
                    + ", each scaled to its peak; orange above 0, blue below. On the right the row through the middle.",
                    lambda figure, shown=shown: _draw(figure, shown),  # type: ignore[misc]
                )
            )
    return Presentation([_table(result)], figures)


def _table(result: Mapping[str, Any]) -> Table:
    rows = []
    for one in result["filters"]:
        fit = one["fit"]
        rows.append(
            [
                f"{_SOURCES[one['source']]}, {one['colours']}",
                f"{one['size']}×{one['size']}",
                ROOTS[one["root"]],
                f"{one['peak']:.2f}",
                f"{100 * one['negative_share']:.0f} %",
                f"{fit['r2']:.3f}",
                f"{fit['r2_around']:.2f}",
                f"{fit['r2_centre_only']:.3f}",
                f"{fit['centre_width']:.2f} / {fit['surround_width']:.2f}",
            ]
        )
    columns = [
        "images", "kernel", "root", "middle weight", "taken back around", "R²", "R² around", "R² without surround",
        "widths (pixels)",
    ]  # fmt: skip
    used = result["settings"]
    cifar = f", {used['count']:,} training images of CIFAR-10" if "cifar10" in used["images"] else ""
    every = "every position" if used["stride"] == 1 else f"one position in {used['stride']} along each side"
    note = (
        f"Two photographs of scikit-learn (427×640, {every}){cifar}; pixels 0 to 1. Looked at is the filter of the "
        "centre pixel, green to green or grey to grey. Fit: centre minus surround, both Gaussian, by least squares; R² "
        "around leaves the middle pixel out of the same fit. A centre of 0.30 is one pixel. A 3×3 filter has pixels at "
        "three distances only, so that there four numbers nearly always fit. Raw ZCA is the exact inverse root of the "
        "covariance with nothing added."
    )
    return Table(columns, rows, title="Whitening filters and their difference of Gaussians", note=note)


def _draw(figure: Figure, entries: Sequence[Mapping[str, Any]]) -> None:
    import numpy as np

    from netdeconv.lab.plots import LINES, tidy

    sizes = list(dict.fromkeys(one["size"] for one in entries))
    figure.set_size_inches(1.75 * len(ROOTS) + 3.9, 1.75 * len(sizes) + 0.6)
    parts: Any = figure.subfigures(1, 2, width_ratios=(1.75 * len(ROOTS), 3.9))
    left, right = parts
    grid = left.subplots(len(sizes), len(ROOTS), squeeze=False)
    profiles = np.atleast_1d(right.subplots(len(sizes), 1, sharex=True))
    for one in entries:
        row, column = sizes.index(one["size"]), list(ROOTS).index(one["root"])
        axes, every = grid[row, column], np.array(one["weights"])
        own = every[len(every) // 2, len(every) // 2]
        own = own / np.abs(own).max()
        axes.imshow(own, vmin=-1, vmax=1, cmap="PuOr_r", interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel(f"R² {one['fit']['r2']:.3f}", fontsize=8)
        if row == 0:
            axes.set_title(ROOTS[one["root"]].replace(", ", "\n"), fontsize=9)
        if column == 0:
            axes.set_ylabel(f"{one['size']}×{one['size']}", fontsize=9)
        offsets = np.arange(len(own)) - len(own) // 2
        profiles[row].plot(
            offsets, own[len(own) // 2], label=ROOTS[one["root"]], markersize=4, linewidth=1.3, **LINES[column]
        )
    for axes in profiles:
        axes.axhline(0, color="0.45", linewidth=0.9)
        axes.set_ylabel("weight", fontsize=8)
        tidy(axes)
    handles = profiles[0].get_legend_handles_labels()
    right.legend(*handles, loc="outside upper center", ncols=2, fontsize=7, frameon=False)
    profiles[-1].set_xlabel("distance from the middle (pixels)", fontsize=8)
