"""Sparsity of responses: most of them near zero, few of them large."""

from __future__ import annotations

import torch
from torch import Tensor

from netdeconv.errors import ShapeError
from netdeconv.functional.precision import exact

__all__ = ["hoyer_sparsity", "kurtosis", "unit_histogram"]


def kurtosis(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Fourth moment over the squared variance of each column: ``E (x - mean)**4 / (E (x - mean)**2)**2``.

    3 for Gaussian numbers, 6 for Laplacian ones, 1 for two equally frequent values; the larger, the longer the tails
    beside the peak. Shifting and scaling x change nothing.

    Shapes: x ``(rows, columns)``, weights ``(rows,)`` or ``None`` -> ``(columns,)`` in float64; NaN for a column that
    never varies.

    Args:
        x: a response in each column.
        weights: how many rows each row stands for; ``None`` for one each.

    Raises:
        ShapeError: x is no matrix, or weights do not fit it.

    Source: Pearson's fourth standardised moment, biased; as a measure of sparsity in B. Willmore and D. Tolhurst,
    "Characterizing the sparseness of neural codes", Network 12 (2001), there less 3.
    """
    x, weights = _checked(x, weights, "kurtosis")
    away = _centred(x, weights)
    share = _shares(x, weights)
    variance = share @ away**2
    return torch.where(variance > 0, (share @ away**4) / variance**2, torch.nan)


def hoyer_sparsity(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """``(sqrt(n) - |x|_1 / |x|_2) / (sqrt(n) - 1)`` of each column: 0 where all n sizes are equal, 1 for one-hot.

    About 0.20 for many Gaussian numbers of mean 0 (``1 - sqrt(2 / pi)``), 0.29 for Laplacian ones (``1 - sqrt(1/2)``).
    Scaling x changes nothing, shifting does: a response far from 0 is not sparse.

    Shapes, args, raises: as :func:`kurtosis`; NaN for a column of zeros, and where there are less than 2 rows.

    Source: P. Hoyer, "Non-negative matrix factorization with sparseness constraints", JMLR 5 (2004), section 3.1.
    """
    x, weights = _checked(x, weights, "hoyer_sparsity")
    weight = torch.ones(len(x), dtype=x.dtype, device=x.device) if weights is None else weights
    root = weight.sum().sqrt()
    ratio = (weight @ x.abs()) / (weight @ x**2).sqrt()
    return (root - ratio) / (root - 1) if root > 1 else torch.full_like(ratio, torch.nan)


def unit_histogram(x: Tensor, weights: Tensor | None = None, *, bins: int = 121, limit: float = 6.0) -> Tensor:
    """Histogram of standardised values, over all columns.

    Shapes: x and weights as in :func:`kurtosis` -> ``(bins,)`` in float64, a density over ``-limit`` to ``limit``
    standard deviations whose integral is 1; values beyond count in the outermost bins. Constant columns are left out.
    """
    x, weights = _checked(x, weights, "unit_histogram")
    away = _centred(x, weights)
    share = _shares(x, weights)
    sd = (share @ away**2).sqrt()
    varies = sd > 0
    scaled = (away[:, varies] / sd[varies]).clamp(-limit, limit)
    index = ((scaled + limit) * (bins / (2 * limit))).long().clamp(max=bins - 1)
    spread = share.unsqueeze(1).expand_as(scaled).flatten()
    counts = torch.zeros(bins, dtype=torch.float64, device=x.device).scatter_add_(0, index.flatten(), spread)
    return counts / counts.sum().clamp(min=torch.finfo(torch.float64).tiny) * (bins / (2 * limit))


def _checked(x: Tensor, weights: Tensor | None, where: str) -> tuple[Tensor, Tensor | None]:
    """In float64."""
    if x.dim() != 2 or not len(x):
        raise ShapeError(f"{where}: expected responses (rows, columns) with rows, got {tuple(x.shape)}.")
    if weights is not None and weights.shape != x.shape[:1]:
        raise ShapeError(f"{where}: expected weights ({len(x)},), one for each row, got {tuple(weights.shape)}.")
    return exact(x), None if weights is None else exact(weights)


def _shares(x: Tensor, weights: Tensor | None) -> Tensor:
    """The part of the whole that each row stands for."""
    if weights is None:
        return torch.full((len(x),), 1 / len(x), dtype=torch.float64, device=x.device)
    return weights / weights.sum()


def _centred(x: Tensor, weights: Tensor | None) -> Tensor:
    """Less the mean of each column; what rounding alone tells apart is nothing."""
    away = x - _shares(x, weights) @ x
    return torch.where(away.abs() > 1e-14 * x.abs().amax(0), away, 0.0)
