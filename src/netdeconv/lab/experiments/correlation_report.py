"""Table, pictures and verdict of the experiment on correlation."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
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
    return Presentation(_verdict(result), [_table(result)], pictures)


def _means(result: Mapping[str, Any], norm: str, when: str, kind: str, *, only: str = "") -> float:
    layers = [layer for layer in result["networks"][norm]["layers"] if only in layer["kind"]]
    return statistics.fmean(layer[when][kind] for layer in layers)


def _verdict(result: Mapping[str, Any]) -> str:
    convs = {"only": "Conv"}
    before, after = (_means(result, "nd", when, "correlation", **convs) for when in ("before", "after"))
    plain = _means(result, "bn", "before", "correlation", **convs)
    kinds = []
    for kind, name in (("pixelwise", "of neighbouring pixels"), ("channelwise", "of channels")):
        pair = [_means(result, "nd", when, kind, **convs) for when in ("before", "after")]
        kinds.append(f"{name} from {pair[0]:.3f} to {pair[1]:.3f}")
    floor = statistics.fmean(_FLOOR / layer["rows"] ** 0.5 for layer in result["networks"]["nd"]["layers"])
    rising = [layer["name"] for layer in result["networks"]["nd"]["layers"] if _gain(layer) >= 0]
    holds = "The claim holds in part" if after < before and after > 2 * floor else "The claim holds"
    holds = "The claim does not hold" if after >= before else holds
    return (
        f"{holds}: over the convolutions, the mean absolute correlation of two features of a patch goes from "
        f"{before:.3f} to {after:.3f} by the remembered roots of 5 steps ({', '.join(kinds)}); independent features "
        f"would show {floor:.3f} in samples of this size. Five steps stop before all correlation is gone, and blocks "
        f"are whitened each for itself. Convolutions behind batch normalisation see {plain:.3f}, which stays."
        + (f" In {', '.join(rising)} the correlation has not fallen." if rising else "")
    )


def _gain(layer: Mapping[str, Any]) -> float:
    return float(layer["after"]["correlation"] - layer["before"]["correlation"])


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
    import numpy as np

    columns: list[tuple[str, str]] = [("bn", "before"), ("nd", "before"), ("nd", "after")]
    drawn = {
        norm: [layer for layer in network["layers"] if layer["before"]["matrix"]]
        for norm, network in result["networks"].items()
    }
    count = len(drawn["nd"])
    figure.set_size_inches(3.0 * len(columns) + 0.9, 3.15 * count)
    grid = figure.subplots(count, len(columns), squeeze=False)
    picture: Any = None
    for column, (norm, when) in enumerate(columns):
        for row, layer in enumerate(drawn[norm]):
            axes = grid[row, column]
            picture = axes.imshow(
                np.array(layer[when]["matrix"]), vmin=0, vmax=1, cmap="cividis", interpolation="nearest"
            )
            title = f"{layer['name']}, {when} whitening" if norm == "nd" else f"{layer['name']}, batch normalisation"
            axes.set_title(f"{title}\nmean {layer[when]['correlation']:.3f}", fontsize=9)
            axes.tick_params(labelsize=7)
    figure.colorbar(picture, ax=grid, shrink=0.6, label="|correlation|")


def _draw_layers(figure: Figure, result: Mapping[str, Any]) -> None:
    from netdeconv.lab.plots import LINES, tidy

    figure.set_size_inches(7.5, 3.6)
    axes = figure.subplots()
    lines: Sequence[tuple[str, str, str]] = (
        ("bn", "before", "behind BatchNorm"),
        ("nd", "before", "network deconvolution, before whitening"),
        ("nd", "after", "network deconvolution, after whitening"),
    )
    for (norm, when, label), style in zip(lines, LINES, strict=False):
        layers = result["networks"][norm]["layers"]
        axes.plot([layer[when]["correlation"] for layer in layers], label=label, linewidth=1.4, markersize=5, **style)
    layers = result["networks"]["nd"]["layers"]
    axes.plot([_FLOOR / layer["rows"] ** 0.5 for layer in layers], color="0.6", linewidth=1, label="independent")
    axes.set_xticks(range(len(layers)), [layer["name"] for layer in layers], rotation=30, ha="right", fontsize=8)
    axes.set(ylabel="mean |correlation|", ylim=(0, None))
    axes.legend(fontsize=8, frameon=False)
    tidy(axes)
