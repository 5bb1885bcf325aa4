"""How well a filter is described by a centre minus a surround: a difference of two Gaussians."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
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
    found, model = _best(_difference, squares, target, [(0, np.inf), (0, np.inf), (_NARROWEST, len(weights)), _RATIO])
    _, single = _best(_gaussian, squares, target, [(0, np.inf), (_NARROWEST, len(weights))])
    surround, above, width, ratio = map(float, found)
    around = squares > 0
    return DifferenceOfGaussians(
        centre=surround + above,
        surround=surround,
        centre_width=width,
        surround_width=width * ratio,
        r2=_described(model, target),
        r2_around=_described(model[around], target[around]),
        r2_centre_only=_described(single, target),
    )


def _gaussian(squares: Any, height: Any, width: Any) -> Any:
    return height * np.exp(-squares / (2 * width**2))


def _difference(squares: Any, surround: Any, above: Any, width: Any, ratio: Any) -> Any:
    """The centre's height is the surround's and what is above it."""
    return _gaussian(squares, surround + above, width) - _gaussian(squares, surround, width * ratio)


def _best(model: Callable[..., Any], squares: Any, target: Any, bounds: Sequence[Any]) -> tuple[Any, Any]:
    """Parameters and values of the best fit of all starts."""
    from scipy.optimize import least_squares

    heights = [1.0] * (len(bounds) // 2)
    starts = ([*heights, width, ratio][: len(bounds)] for width, ratio in itertools.product(_CENTRES, _RATIOS))
    found = [
        least_squares(lambda parameters: model(squares, *parameters) - target, start, bounds=np.transpose(bounds))
        for start in starts
    ]
    best = min(found, key=lambda one: float(one.cost)).x
    return best, model(squares, *best)


def _described(model: Any, target: Any) -> float:
    total = ((target - target.mean()) ** 2).sum()
    return float(1 - ((model - target) ** 2).sum() / total) if total > 0 else float("nan")
