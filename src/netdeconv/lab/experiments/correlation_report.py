"""Table and pictures of the experiment on correlation."""

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

_KINDS = ("correlation", "pixelwise", "channelwise")
_FLOOR = 0.8  # of sqrt(rows): mean size of the correlation of independent features


def present(result: Mapping[str, Any]) -> Presentation:
    """What came out."""
    pictures = [
        Picture(
            "correlation-matrices",
            "Absolute correlation of the first features that convolutions see: dark is 0, bright is 1. Features are "
            "ordered by channel, then by tap.",
            lambda figure: _draw_matrices(figure, result),
        ),
        Picture(
            "correlation-layers",
            "Mean absolute correlation of two features of a patch, layer by layer; grey: independent features in a "
            "sample of this size.",
            lambda figure: _draw_layers(figure, result),
        ),
    ]
    return Presentation([_table(result)], pictures)


def _table(result: Mapping[str, Any]) -> Table:
    rows = []
    for norm, network in result["networks"].items():
        for layer in network["layers"]:
            after = layer["after"]
            rows.append(
                [
                    f"{METHODS[norm]}, {layer['name']}",
                    str(layer["features"]),
                    str(layer["rows"]),
                    *(
                        f"{layer['before'][kind]:.3f}" + (f" → {after[kind]:.3f}" if after else "")
                        if _has(layer, kind)
                        else "–"
                        for kind in _KINDS
                    ),
                    f"{layer['condition']:.1e}",
                    "–" if layer["residual"] is None else f"{layer['residual']:.2f}",
                ]
            )
    columns = ["layer", "features", "patches", "all pairs", "pixels", "channels", "condition", "residual of the root"]
    accuracy = ", ".join(f"{METHODS[norm]} {100 * one['accuracy']:.1f} %" for norm, one in result["networks"].items())
    note = (
        f"Before → after whitening. {training_line(result['settings'])}; test accuracy {accuracy}. Pixels: two taps of "
        "one channel; channels: two channels at one tap. Condition: of the covariance plus eps, the worst block. "
        "Residual: |D (cov + eps) D - 1| over the root of the size, 0 is white. Networks with batch normalisation see "
        "their input as it is; its blocks are those that whitening would use."
    )
    return Table(columns, rows, title="Mean absolute correlation of what layers see", note=note)


def _has(layer: Mapping[str, Any], kind: str) -> bool:
    """Whether there are such pairs."""
    return layer["taps"] > 1 if kind == "pixelwise" else layer["features"] > layer["taps"] or kind == "correlation"


def _draw_matrices(figure: Figure, result: Mapping[str, Any]) -> None:
    from netdeconv.lab.plots import draw_matrices

    columns = [
        [
            (f"{layer['name']}, {label}\nmean {layer[when]['correlation']:.3f}", layer[when]["matrix"])
            for layer in result["networks"][norm]["layers"]
            if layer["before"]["matrix"]
        ]
        for norm, when, label in (
            ("bn", "before", "batch normalisation"),
            ("nd", "before", "before whitening"),
            ("nd", "after", "after whitening"),
        )
    ]
    figure.set_size_inches(3.0 * len(columns) + 0.9, 3.15 * len(columns[0]))
    draw_matrices(figure, list(zip(*columns, strict=True)))


def _draw_layers(figure: Figure, result: Mapping[str, Any]) -> None:
    from netdeconv.lab.plots import draw_layers

    figure.set_size_inches(7.5, 3.6)
    bn, nd = (result["networks"][norm]["layers"] for norm in ("bn", "nd"))
    lines = {
        "behind BatchNorm": [layer["before"]["correlation"] for layer in bn],
        "network deconvolution, before whitening": [layer["before"]["correlation"] for layer in nd],
        "network deconvolution, after whitening": [layer["after"]["correlation"] for layer in nd],
    }
    axes = figure.subplots()
    axes.plot([_FLOOR / layer["rows"] ** 0.5 for layer in nd], color="0.6", linewidth=1, label="independent")
    draw_layers(axes, [layer["name"] for layer in nd], lines, ylabel="mean |correlation|", ylim=(0, None))
