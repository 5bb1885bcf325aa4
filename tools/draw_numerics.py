"""Draw the pictures of docs/numerics.md: python tools/draw_numerics.py [FOLDER]"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from netdeconv.functional import inverse_sqrt
from netdeconv.inspect import correlation, mean_abs_offdiagonal, patch_covariance
from netdeconv.lab.data import photographs
from netdeconv.lab.plots import LINES, png, tidy
from netdeconv.reference import ns_gain

STEPS = (1, 3, 4, 5, 15)
OF_PATCHES = (3, 5, 15)  # in the picture of correlations
SMALLEST = 1e-6  # relative eigenvalue, on the left of the picture of gains
CHANNELS, TAPS, BLOCK = 8, 4, 4  # of the picture of blocks


def gains() -> Figure:
    """Gain of an eigenvalue by the number of steps."""
    figure = Figure(figsize=(7.2, 4.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    values = torch.logspace(torch.tensor(SMALLEST).log10(), 0, 200, dtype=torch.float64)
    axes.plot(values, values.rsqrt(), color="0.6", linewidth=4, label="exact: 1 / √a")
    for steps, style in zip(STEPS, LINES, strict=False):
        line = {**style, "marker": None}
        axes.plot(values, [ns_gain(float(a), steps) for a in values], label=f"{steps} step{'s' * (steps > 1)}", **line)
    axes.set(xscale="log", yscale="log", ylim=(0.8, 1200))
    axes.set(xlabel="eigenvalue, share of the covariance's norm", ylabel="gain")
    axes.legend(frameon=False, fontsize=9)
    tidy(axes)
    return figure


def correlations() -> Figure:
    """Correlation of the 27 features of a 3x3 patch of photographs, as they are and whitened."""
    cov = patch_covariance(photographs(), 3)
    eye = torch.eye(len(cov), dtype=cov.dtype)
    panels = [("patches as they are", correlation(cov))]
    for steps in OF_PATCHES:
        scaled = correlation(cov) + 1e-5 * eye
        root = inverse_sqrt(scaled, num_iters=steps, solver="newton_schulz")
        panels.append((f"{steps} steps", correlation(root @ scaled @ root)))
    figure = Figure(figsize=(7.2, 6.8), dpi=130, layout="constrained")
    grid = figure.subplots(2, 2)
    picture: Any = None
    for axes, (title, matrix) in zip(grid.flat, panels, strict=True):
        picture = axes.imshow(matrix.abs(), vmin=0, vmax=1, cmap="cividis", interpolation="nearest")
        axes.set_title(f"{title}\nmean |correlation| {mean_abs_offdiagonal(matrix):.3f}", fontsize=10)
        axes.set_xlabel("channel, then tap", fontsize=9)
        axes.set_xticks([0, 9, 18], ["red", "green", "blue"], fontsize=8)
        axes.set_yticks([0, 9, 18], ["red", "green", "blue"], fontsize=8)
    figure.colorbar(picture, ax=grid, shrink=0.6, label="|correlation|")
    return figure


def blocks() -> Figure:
    """Which pairs of features are whitened together, by the grouping."""
    features = CHANNELS * TAPS
    index = torch.arange(features)
    parts = {
        "one block": torch.zeros(features),
        f"contiguous, block_size={BLOCK}": index // (BLOCK * TAPS),
        f"interleaved, block_size={BLOCK}": index % (CHANNELS // BLOCK),
    }
    figure = Figure(figsize=(8, 3), dpi=130, layout="constrained")
    for axes, (title, part) in zip(figure.subplots(1, len(parts)), parts.items(), strict=True):
        axes.imshow(part[:, None] == part[None, :], vmin=0, vmax=1.4, cmap="cividis", interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(0, features, TAPS), range(CHANNELS), fontsize=8)
        axes.set_yticks(range(0, features, TAPS), range(CHANNELS), fontsize=8)
        axes.set_xlabel(f"channel, {TAPS} taps each", fontsize=9)
    return figure


PICTURES = {"numerics-gain.png": gains, "numerics-correlation.png": correlations, "numerics-blocks.png": blocks}


def main(folder: Path) -> None:
    """Write all pictures into this folder."""
    for name, draw in PICTURES.items():
        (folder / name).write_bytes(png(draw()))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "docs" / "images")
