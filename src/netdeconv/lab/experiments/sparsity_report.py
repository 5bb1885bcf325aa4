"""Tables and histograms of the experiment on sparsity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from netdeconv.lab.experiments.comparison import METHODS
from netdeconv.lab.experiments.experiment import Picture, Presentation
from netdeconv.lab.experiments.trained import training_line
from netdeconv.lab.report import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["present"]

_LIMIT = 6.0  # of the histograms, in standard deviations
def present(result: Mapping[str, Any]) -> Presentation:
    """What came out."""
    pictures = [
        Picture(
            "sparsity-photographs",
            "How often responses to photographs lie how many standard deviations from their mean, on a logarithmic "
            "scale; the grey curve is Gaussian.",
            lambda figure: _draw_photographs(figure, result),
        ),
        Picture(
            "sparsity-layers",
            "Kurtosis of what every layer sees, mean over its features; 3 is Gaussian, 6 Laplacian.",
            lambda figure: _draw_layers(figure, result),
        ),
    ]
    return Presentation([_photographs_table(result), _layers_table(result)], pictures)


def _photographs_table(result: Mapping[str, Any]) -> Table:
    rows = [[f"{one['size']}×{one['size']}", one["root"], *_cells(one)] for one in result["photographs"]]
    patches = max(one["rows"] for one in result["photographs"])
    note = (
        f"Up to {patches:,} patches of scikit-learn's two photographs in colour, statistics exactly theirs. Kurtosis "
        "and Hoyer's sparsity of each feature over the patches, mean over the features; standardising changes no "
        "kurtosis. Hoyer's sparsity is 0 where all are the same size, 1 where all but one are 0; about 0.20 for "
        "Gaussian numbers of mean 0, 0.29 for Laplacian ones."
    )
    return Table(["patch", "root", *_COLUMNS], rows, title="Photographs", note=note)


def _layers_table(result: Mapping[str, Any]) -> Table:
    rows = [
        [f"{METHODS[norm]}, {layer['name']}", *_cells(layer)]
        for norm, network in result["networks"].items()
        for layer in network["layers"]
    ]
    accuracy = ", ".join(f"{METHODS[norm]} {100 * one['accuracy']:.1f} %" for norm, one in result["networks"].items())
    note = f"What the layers of {training_line(result['settings'])}; test accuracy {accuracy}. As in the table above."
    return Table(["layer", *_COLUMNS], rows, title="Layers of trained networks", note=note)


_COLUMNS = ("kurtosis, raw", "kurtosis, whitened", "Hoyer, raw", "Hoyer, standardised", "Hoyer, whitened")


def _cells(one: Mapping[str, Any]) -> list[str]:
    white = one["whitened"]
    return [
        _number(one["raw"]["kurtosis"], 1),
        _number(white and white["kurtosis"], 1),
        _number(one["raw"]["hoyer"], 3),
        _number(one["standardised"]["hoyer"], 3),
        _number(white and white["hoyer"], 3),
    ]


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _draw_photographs(figure: Figure, result: Mapping[str, Any]) -> None:
    import numpy as np

    from netdeconv.lab.plots import LINES, tidy

    photos = result["photographs"]
    sizes = list(dict.fromkeys(one["size"] for one in photos))
    figure.set_size_inches(3.4 * len(sizes) + 0.6, 3.5)
    for axes, size in zip(figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0], sizes, strict=True):
        found = [one for one in photos if one["size"] == size]
        lines = {"raw, standardised": found[0]["raw"]} | {f"whitened, {one['root']}": one["whitened"] for one in found}
        for (label, responses), style in zip(lines.items(), LINES, strict=False):
            density = np.array(responses["histogram"])
            edges = np.linspace(-_LIMIT, _LIMIT, len(density) + 1)
            middle = (edges[1:] + edges[:-1]) / 2
            density = np.where(density > 0, density, np.nan)
            # The outermost bins hold all that lies further out.
            axes.plot(middle[1:-1], density[1:-1], label=label, linewidth=1.4, **{**style, "marker": ""})
        axes.plot(middle, np.exp(-(middle**2) / 2) / np.sqrt(2 * np.pi), color="0.6", linewidth=1, label="Gaussian")
        axes.set(yscale="log", ylim=(1e-5, 5), title=f"{size}×{size}", xlabel="standard deviations")
        tidy(axes)
    figure.axes[0].set_ylabel("density")
    figure.axes[0].legend(fontsize=7, frameon=False, loc="lower center")


def _draw_layers(figure: Figure, result: Mapping[str, Any]) -> None:
    from netdeconv.lab.plots import draw_layers

    figure.set_size_inches(7.5, 3.6)
    bn, nd = (result["networks"][norm]["layers"] for norm in ("bn", "nd"))
    lines = {
        "behind BatchNorm": [layer["raw"]["kurtosis"] for layer in bn],
        "network deconvolution, before whitening": [layer["raw"]["kurtosis"] for layer in nd],
        "network deconvolution, after whitening": [layer["whitened"]["kurtosis"] for layer in nd],
    }
    axes = figure.subplots()
    for value in (3, 6):
        axes.axhline(value, color="0.6", linewidth=0.9, linestyle=":")
    draw_layers(axes, [layer["name"] for layer in nd], lines, yscale="log", ylabel="kurtosis")
