"""The inverse root of a covariance of few rows, by products of the size of the rows instead of the features."""

from __future__ import annotations

import torch
from torch import Tensor

from netdeconv.errors import ShapeError
from netdeconv.functional.isqrt import SOLVERS, chosen_solver, iterated, too_many_for_tf32
from netdeconv.functional.precision import without_autocast

__all__ = ["inverse_sqrt_of_rows"]


def inverse_sqrt_of_rows(rows: Tensor, *, eps: float, num_iters: int = 5, solver: str = "auto") -> Tensor:
    """``inverse_sqrt(rows^T rows + eps I, num_iters=num_iters, solver=solver)``, for fewer rows than features.

    The same iteration, carried out on what the rows x span. A polynomial p of ``x^T x + eps I`` is
    ``p(eps) I + x^T q x``, and with the Gram matrix ``K = x x^T + eps I`` the triangular matrix of blocks
    ``[[K, 0], [I, eps I]]`` carries q along: p of it is ``[[p(K), 0], [q, p(eps) I]]``. So its products are of twice
    the rows, and pay for fewer rows than a quarter of the features.

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
    with without_autocast(rows.device.type):
        rows = rows.to(torch.float64 if too_many_for_tf32(rows, num_iters) else dtype)
        # Divided by the larger of the largest entry and the root of eps, squares stay inside float32's range.
        largest = rows.detach().abs().amax().clamp(min=eps**0.5)
        largest = torch.where(largest > 0, largest, torch.ones_like(largest))
        x = rows / largest
        count, features = x.shape
        gram, added = x @ x.mT, (eps**0.5 / largest).square()
        square = gram.square().sum() + added * (2 * gram.trace() + features * added)
        norm = torch.where(square > 0, square, torch.ones_like(square)).sqrt()
        one = torch.eye(count, dtype=x.dtype, device=x.device)
        right = torch.cat([torch.zeros_like(one), added * one])
        triangular = torch.cat([torch.cat([gram + added * one, one]), right], dim=1) / norm
        eye = torch.eye(2 * count, dtype=x.dtype, device=x.device)
        root = iterated(triangular, eye, num_iters, chosen_solver(solver, num_iters))
        scale = norm.rsqrt() / largest
        elsewhere = torch.eye(features, dtype=x.dtype, device=x.device) * (root[-1, -1] * scale)
        return torch.addmm(elsewhere, x.mT, (scale * root[count:, :count]) @ x).to(dtype)
