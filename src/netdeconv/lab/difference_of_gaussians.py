"""How well a filter is described by a centre minus a surround: a difference of two Gaussians."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
from torch import Tensor

from netdeconv import ShapeError

__all__ = ["DifferenceOfGaussians", "fit_difference_of_gaussians"]

# Widths to start from, in pixels: the fit has several local optima, the best of all starts is taken.
_CENTRES, _RATIOS = (0.4, 0.8, 1.6), (1.7, 3.0, 6.0)
# A centre narrower than this is one pixel, whatever its width.
_NARROWEST = 0.3
# Bounds of the surround's width over the centre's. Nearer to 1 the heights would grow without end, while the difference
# tends to the Laplacian of a Gaussian, which that of the ratio 1.6 comes close to (D. Marr and E. Hildreth, "Theory of
# edge detection", Proc. R. Soc. B 207 (1980), appendix B).
_RATIO = (1.6, 40.0)


@dataclasses.dataclass(frozen=True)
class DifferenceOfGaussians:
    """``centre exp(-r**2 / 2 centre_width**2) - surround exp(-r**2 / 2 surround_width**2)``, r from the middle pixel.

    Attributes:
        centre, surround: heights, relative to the filter's largest absolute weight; the second is at least 0, and at
            most the first.
        centre_width, surround_width: standard deviations in pixels, the second the larger.
        r2: share of the filter's variance over its pixels that is described, 1 for all of it.
        r2_around: the same over all pixels but the middle one, which alone makes most of the variance.
        r2_centre_only: of the best single Gaussian.
    """

    centre: float
    surround: float
    centre_width: float
    surround_width: float
    r2: float
    r2_around: float
    r2_centre_only: float


def fit_difference_of_gaussians(kernel: Tensor) -> DifferenceOfGaussians:
    """Least squares over the pixels of a filter whose middle pixel has the centre.

    Shapes: ``(k, k)``, k odd and at least 3. A kernel of 3x3 has pixels at three distances from the middle only, fewer
    than there are parameters, so that any centre with a surround is described nearly exactly.

    Raises:
        ShapeError: another shape.

    Source: R. Rodieck, "Quantitative analysis of cat retinal ganglion cell response to visual stimuli", Vision
    Research 5 (1965), for the model.
    """
    if kernel.dim() != 2 or kernel.shape[0] != kernel.shape[1] or kernel.shape[0] < 3 or kernel.shape[0] % 2 == 0:
        raise ShapeError(
            f"fit_difference_of_gaussians: expected a filter (k, k), k odd and >= 3, got {tuple(kernel.shape)}."
        )
    weights = kernel.double().numpy()
    weights = weights / np.abs(weights).max()
    offsets = np.arange(len(weights)) - len(weights) // 2
    squares = (offsets[:, None] ** 2 + offsets**2).ravel().astype(float)
    target = weights.ravel()
    (both, alone), widths, model = _best(squares, target, len(weights), two=True)
    _, _, single = _best(squares, target, len(weights), two=False)
    around = squares > 0
    return DifferenceOfGaussians(
        centre=float(both + alone),
        surround=float(both),
        centre_width=float(widths[0]),
        surround_width=float(widths[1]),
        r2=_described(model, target),
        r2_around=_described(model[around], target[around]),
        r2_centre_only=_described(single, target),
    )


def _best(squares: Any, target: Any, side: int, *, two: bool) -> tuple[Any, Any, Any]:
    """Heights, widths and values of the best fit; the heights follow from the widths, which alone are searched for."""
    from scipy.optimize import minimize

    bounds = np.log([(_NARROWEST, side), _RATIO])[: 1 + two]
    starts = itertools.product(_CENTRES, _RATIOS if two else (1.0,))

    def loss(logs: Any) -> float:
        return float(((_solved(logs, squares, target)[2] - target) ** 2).sum())

    found = [
        minimize(loss, np.log(start)[: 1 + two], method="Nelder-Mead", bounds=bounds)
        for start in starts
    ]
    return _solved(min(found, key=lambda one: one.fun).x, squares, target)


def _solved(logs: Any, squares: Any, target: Any) -> tuple[Any, Any, Any]:
    """The best heights for the logarithms of the centre's width and of the ratio of widths.

    Heights of what is subtracted at the same height, and of what is not; both at least 0.
    """
    from scipy.optimize import nnls

    widths = np.exp(np.cumsum(logs))
    gaussians = np.exp(-squares[:, None] / (2 * widths**2))
    columns = gaussians if len(widths) == 1 else np.stack([gaussians[:, 0] - gaussians[:, 1], gaussians[:, 0]], axis=1)
    heights, _ = nnls(columns, target)
    return heights, widths, columns @ heights


def _described(model: Any, target: Any) -> float:
    total = ((target - target.mean()) ** 2).sum()
    return float(1 - ((model - target) ** 2).sum() / total) if total > 0 else float("nan")
