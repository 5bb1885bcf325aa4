"""The inverse root of a covariance of few rows, by products of the size of the rows instead of the features."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from netdeconv.errors import ShapeError
from netdeconv.functional.isqrt import too_many_for_tf32

__all__ = ["inverse_sqrt_of_rows"]


class _Element(NamedTuple):
    """``scalar I + x^T inner x``, for rows x that are always the same, with what it does to them: ``outer x``.

    Polynomials of ``x^T x`` have this form. ``outer = scalar I + x x^T inner``; all matrices are as large as the
    number of rows, symmetric, and commute.
    """

    scalar: Tensor
    inner: Tensor
    outer: Tensor

    def times(self, other: _Element) -> _Element:
        inner = self.scalar * other.inner + self.inner @ other.outer
        return _Element(self.scalar * other.scalar, inner, self.outer @ other.outer)

    def step(self, eye: Tensor) -> _Element:
        """``(3 I - self) / 2``."""
        return _Element(1.5 - 0.5 * self.scalar, -0.5 * self.inner, 1.5 * eye - 0.5 * self.outer)


def inverse_sqrt_of_rows(rows: Tensor, *, eps: float, num_iters: int = 5) -> Tensor:
    """``inverse_sqrt(rows^T rows + eps I, num_iters=num_iters, solver="newton_schulz")``, for fewer rows than features.

    The same iteration, carried out on what the rows span, and known outside: there the gain is that of ``eps``.
    ``6 num_iters`` products of the size of the rows replace ``3 num_iters`` of the size of the features.

    Shapes: rows ``(rows, features)`` -> ``(features, features)``, in float32 at least. Differentiable.

    Raises:
        ShapeError: rows is not a matrix, or empty.
        ValueError: num_iters < 1.

    Source: Ye et al. 2020, section 3.3, for the iteration; that it runs on the Gram matrix is ours.
    """
    if rows.dim() != 2 or rows.numel() == 0:
        raise ShapeError(
            f"inverse_sqrt_of_rows: expected rows of shape (rows, features), at least one of each, got "
            f"{tuple(rows.shape)}. Pass a matrix with one sample per row."
        )
    if num_iters < 1:
        raise ValueError(f"inverse_sqrt_of_rows: expected num_iters >= 1, got {num_iters}. The published number is 5.")
    dtype = torch.promote_types(rows.dtype, torch.float32)
    with torch.autocast(rows.device.type, enabled=False):
        rows = rows.to(torch.float64 if too_many_for_tf32(rows, num_iters) else dtype)
        # Divided by the larger of the largest entry and the root of eps, squares stay inside float32's range.
        largest = rows.detach().abs().amax().clamp(min=eps**0.5)
        largest = torch.where(largest > 0, largest, torch.ones_like(largest))
        x = rows / largest
        gram, added = x @ x.mT, (eps**0.5 / largest).square()
        square = gram.square().sum() + added * (2 * gram.trace() + rows.shape[1] * added)
        norm = torch.where(square > 0, square, torch.ones_like(square)).sqrt()
        eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
        scalar, inner = added / norm, eye / norm
        y = _Element(scalar, inner, scalar * eye + gram / norm)
        z = step = y.step(eye)
        for _ in range(num_iters - 1):
            y = y.times(step)
            step = z.times(y).step(eye)
            z = step.times(z)
        identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        return ((z.scalar * identity + x.mT @ (z.inner @ x)) * (norm.rsqrt() / largest)).to(dtype)
