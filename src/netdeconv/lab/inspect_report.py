"""Table, pictures and page of the command inspect."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor, nn

from netdeconv.inspect import LayerView, centre_filters
from netdeconv.lab.plots import draw_layers, draw_matrices, png
from netdeconv.lab.report import Page, Table
from netdeconv.lab.store import write_whole

__all__ = ["describe", "layer_table", "whitening_filters_of", "write"]

_DRAWN = 72  # features of a correlation matrix that are drawn
_SHOWN = 32  # filters of the first layer
_CHANNELS = {1: ("grey",), 3: ("red", "green", "blue")}

_COLUMNS = [
    "layer", "kind", "features", "patches", "correlation", "pixels", "channels", "condition", "root residual", "age",
    "kurtosis", "Hoyer", "cost",
]  # fmt: skip
_NOTE = (
    "Before → after whitening. correlation: mean absolute value of two features of a patch, of which pixels are two "
    "taps of one channel and channels two channels at one tap; condition: of the covariance plus eps, the worst block, "
    "in convolutions by default of channels over their deviation; "
    "root residual: |D (cov + eps) D - 1| over the root of the size, 0 is white; age: training steps since the root "
    "was computed; kurtosis: 3 for Gaussian numbers; Hoyer's sparsity: 0.2 for Gaussian numbers of mean 0, here before "
    "whitening with the mean taken off; cost: operations that whitening adds to the convolution's in an average "
    "training step on these images. Layers without whitening have no second number."
)


def layer_table(views: Sequence[LayerView], costs: Mapping[str, float]) -> Table:
    """One row for each layer; with what whitening adds to its step, by name, where that is known."""
    rows = []
    for view in views:
        rows.append(
            [
                view.name or "(the model)",
                view.kind,
                str(view.features),
                str(view.rows),
                _pair(view, "correlation", 3),
                _pair(view, "pixelwise", 3) if view.taps > 1 else "–",
                _pair(view, "channelwise", 3) if view.features > view.taps else "–",
                f"{view.condition:.1e}",
                "–" if view.root_residual is None else f"{view.root_residual:.2f}",
                "–" if view.refresh_age is None else str(view.refresh_age),
                _pair(view, "kurtosis", 1),
                _pair(view, "hoyer", 2),
                f"+{100 * costs[view.name]:.0f} %" if view.name in costs else "–",
            ]
        )
    return Table(_COLUMNS, rows, title="Layer by layer", note=_NOTE)


def describe(views: Sequence[LayerView], costs: Mapping[str, float]) -> str:
    """The table for a terminal."""
    table = layer_table(views, costs)
    return f"{table.to_text()}\n\n{table.note}"


def write(
    out: Path, title: str, line: str, net: nn.Module, views: Sequence[LayerView], costs: Mapping[str, float]
) -> list[Path]:
    """Write ``inspect.html`` and its pictures; returns the files."""
    maps = [view for view in views if view.features > 1 and view.taps > 1] or list(views)
    chosen = {maps[0].name, maps[len(maps) // 2].name, maps[-1].name}
    pictures = {
        "filters.png": (_filters(net, views[0]), "Filters of the first layer", _OF_FILTERS),
        "layers.png": (_layers(views), "Correlation and kurtosis of every layer's input", _OF_LAYERS),
        "correlation.png": (
            _correlations([view for view in views if view.name in chosen]),
            "Absolute correlation matrices",
            f"Absolute correlation of the first {_DRAWN} features of a patch, ordered by channel, then by tap.",
        ),
    }
    page = Page(title, wide=True)
    page.paragraph(line)
    table = layer_table(views, costs)
    page.heading(table.title)
    page.table(table)
    page.paragraph(table.note, soft=True)
    files = [out / "inspect.html"]
    for name, (figure, heading, caption) in pictures.items():
        if figure is not None:
            page.heading(heading)
            content = png(figure)
            page.picture(content, alt=heading, caption=caption)
            files.append(out / name)
            write_whole(files[-1], content)
    write_whole(files[0], page.to_html().encode())
    return files


_OF_LAYERS = (
    "Left: mean absolute correlation; right: kurtosis, 3 for Gaussian numbers. Layers in the order of the first call."
)
_OF_FILTERS = (
    "First row, where the layer whitens: the filters of the centre pixel that whiten its patches, one per channel, "
    "grey is 0, each scaled to its peak. Below: the layer's own filters, with the whitening folded in, scaled likewise."
)


def _pair(view: LayerView, name: str, digits: int) -> str:
    """Before and after whitening; Hoyer's sparsity with the mean taken off before, too."""
    before = view.standardised if name == "hoyer" else view.raw
    values = [getattr(responses, name) for responses in (before, view.whitened) if responses is not None]
    return " → ".join("–" if math.isnan(value) else f"{value:.{digits}f}" for value in values)


def _layers(views: Sequence[LayerView]) -> Figure:
    figure = Figure(figsize=(11, 3.8), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, key, more in (
        (left, "correlation", {"ylabel": "mean |correlation|", "ylim": (0, None)}),
        (right, "kurtosis", {"ylabel": "kurtosis", "yscale": "log"}),
    ):
        lines = {"before whitening": [getattr(view.raw, key) for view in views]}
        if any(view.whitened for view in views):
            white = [math.nan if view.whitened is None else getattr(view.whitened, key) for view in views]
            lines["after whitening"] = white
        draw_layers(axes, [view.name for view in views], lines, xlabel="layer", **more)
    return figure


def _correlations(views: Sequence[LayerView]) -> Figure:
    figure = Figure(figsize=(6.6, 3.1 * len(views)), dpi=130, layout="constrained")
    rows = [
        [
            None
            if responses is None
            else (f"{view.name}, {when}: mean {responses.correlation:.3f}", responses.matrix[:_DRAWN, :_DRAWN].cpu())
            for responses, when in ((view.raw, "before"), (view.whitened, "after"))
        ]
        for view in views
    ]
    for first, second in draw_matrices(figure, rows):
        first.set_ylabel("feature (channel, then tap)", fontsize=8)
        for axes in (first, second):
            axes.set_xlabel("feature", fontsize=8)
    return figure


def _filters(net: nn.Module, view: LayerView) -> Figure | None:
    """Of the first layer, if it is a convolution of grey or colour images; its whitening filters if it whitens."""
    layer: Any = net.get_submodule(view.name)
    weight = getattr(layer, "weight", None)
    if weight is None or weight.dim() != 4 or weight.shape[1] not in (1, 3):
        return None
    centre = None
    if view.whitened is not None:
        weight = layer.folded()[0]
        if layer.whitening.blocks.single and all(k % 2 for k in layer.kernel_size):
            centre = whitening_filters_of(layer)
    own = weight.detach()[:_SHOWN]
    columns = 8
    rows = math.ceil(len(own) / columns) + (centre is not None)
    figure = Figure(figsize=(1.05 * columns, 1.25 * rows), dpi=130, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    if centre is not None:
        for axes, kernel, channel in zip(grid[0], centre, _CHANNELS[len(centre)], strict=False):
            _show(axes, kernel, f"whitening\n{channel}")
    for i, kernel in enumerate(own):
        _show(grid[i // columns + (centre is not None), i % columns], kernel, f"filter {i}")
    return figure


def whitening_filters_of(layer: Any) -> Tensor:
    """Filters of the centre pixel that whiten a layer's input: the rows of ``D S``, root times scale; one block."""
    found = layer.whitening.remembered()
    root = found.roots[0].detach()
    if found.scale is not None:
        root = root * layer.whitening.blocks.of_channels(found.scale).flatten()
    return centre_filters(root.reshape(len(root), -1, *layer.kernel_size))


def _show(axes: Any, kernel: Any, title: str) -> None:
    axes.set_title(title, fontsize=7, pad=2)
    values = kernel.permute(1, 2, 0).double().cpu().numpy()
    scaled = 0.5 + 0.5 * values / max(np.abs(values).max(), 1e-30)
    axes.imshow(scaled if scaled.shape[2] == 3 else scaled[:, :, 0], vmin=0, vmax=1, cmap="gray")
