"""The inverse root of a covariance of few rows, by products of the size of the rows instead of the features."""

from __future__ import annotations

import torch
from torch import Tensor

from netdeconv.errors import ShapeError
from netdeconv.functional.isqrt import SOLVERS, chosen_solver, iterated, too_many_for_tf32

__all__ = ["inverse_sqrt_of_rows"]


class _Element:
    """``scalar I + x^T inner x`` for rows x that are always the same, as polynomials of ``x^T x`` are.

    What it does to the rows, ``outer x`` with ``outer = scalar I + x x^T inner``, is carried along, below ``inner``
    in one tensor of shape ``(2 rows, rows)``, so that a product of two elements is one matrix product. Inner and
    outer are symmetric, and commute with those of other elements.
    """

    def __init__(self, scalar: Tensor, pair: Tensor) -> None:
        self.scalar, self.pair = scalar, pair

    @property
    def inner(self) -> Tensor:
        return self.pair[: self.pair.shape[1]]

    @property
    def outer(self) -> Tensor:
        return self.pair[self.pair.shape[1] :]

    def __matmul__(self, other: _Element) -> _Element:
        inner, outer = (self.pair @ other.outer).chunk(2)
        return _Element(self.scalar * other.scalar, torch.cat([inner + self.scalar * other.inner, outer]))

    def __rmul__(self, factor: float) -> _Element:
        return _Element(factor * self.scalar, factor * self.pair)

    def __add__(self, other: _Element) -> _Element:
        return _Element(self.scalar + other.scalar, self.pair + other.pair)

    def __sub__(self, other: _Element) -> _Element:
        return _Element(self.scalar - other.scalar, self.pair - other.pair)


def inverse_sqrt_of_rows(rows: Tensor, *, eps: float, num_iters: int = 5, solver: str = "auto") -> Tensor:
    """``inverse_sqrt(rows^T rows + eps I, num_iters=num_iters, solver=solver)``, for fewer rows than features.

    The same iteration, carried out on what the rows span, and known outside: there the gain is that of ``eps``.
    Its products are of twice the rows by the rows, instead of the features.

    Shapes: rows ``(rows, features)`` -> ``(features, features)``, in float32 at least. Differentiable.

    Raises:
        ShapeError: rows is not a matrix, or empty.
        ValueError: num_iters < 1, or a solver that is no iteration or has no coefficients for num_iters.

    Source: Ye et al. 2020, section 3.3, for the iteration; that it runs on the Gram matrix is ours.
    """
    if rows.dim() != 2 or rows.numel() == 0:
        raise ShapeError(
            f"inverse_sqrt_of_rows: expected rows of shape (rows, features), at least one of each, got "
            f"{tuple(rows.shape)}. Pass a matrix with one sample per row."
        )
    if num_iters < 1:
        raise ValueError(f"inverse_sqrt_of_rows: expected num_iters >= 1, got {num_iters}. The published number is 5.")
    if solver not in SOLVERS or solver == "eigh":
        raise ValueError(f"inverse_sqrt_of_rows: expected a solver that iterates, got {solver!r}. Pass 'auto'.")
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
        one = torch.eye(len(x), dtype=x.dtype, device=x.device)
        scalar = added / norm
        cov = _Element(scalar, torch.cat([one / norm, scalar * one + gram / norm]))
        eye = _Element(torch.ones_like(scalar), torch.cat([torch.zeros_like(one), one]))
        root = iterated(cov, eye, num_iters, chosen_solver(solver, num_iters))
        identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        scale = norm.rsqrt() / largest
        return torch.addmm((root.scalar * scale) * identity, x.mT, (scale * root.inner) @ x).to(dtype)
