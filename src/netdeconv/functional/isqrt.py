"""The inverse square root of a covariance: what turns correlated data into white data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from netdeconv.errors import NumericalError, ShapeError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SOLVERS", "inverse_sqrt"]

SOLVERS = ("newton_schulz", "eigh")

# Above this many steps rounding in the products is amplified by more than 1.5**(2 * 8) = 657, which TF32's
# 1e-3 does not bear.
_MAX_ITERS_IN_TF32 = 8


def inverse_sqrt(cov: Tensor, *, num_iters: int = 5, solver: str = "newton_schulz") -> Tensor:
    """Symmetric ``D`` with ``D cov D`` near the identity, for one matrix or a batch of them.

    ``"newton_schulz"`` takes ``num_iters`` steps of the coupled iteration ``T = (3 I - Z Y) / 2``,
    ``Y <- Y T``, ``Z <- T Z`` from ``Y = cov / |cov|_F``, ``Z = I``, and returns ``Z / sqrt(|cov|_F)``. Its
    gain for an eigenvalue of relative size a is near ``1 / sqrt(a)`` but never above ``1.5**num_iters``: with
    5 steps that regularises, as published, and only large eigenvalues are whitened. ``"eigh"`` gives the
    exact root and ignores ``num_iters``; eigenvalues below rounding are treated as rounding errors.

    Shapes: cov ``(..., n, n)``, symmetric positive semi-definite -> ``(..., n, n)``, same dtype; half
    precision is computed in float32. Scaling cov by c scales the result by ``c**-0.5``. A zero matrix gives a
    finite multiple of the identity.

    Differentiable: Newton-Schulz any number of times, ``"eigh"`` once, by a formula that stays finite for
    equal eigenvalues.

    Raises:
        ShapeError: cov is not square.
        NumericalError: the eigendecomposition failed.

    Source: Ye et al. 2020, section 3.3; Denman and Beavers 1976; Higham, Functions of Matrices, chapter 6.
    """
    if cov.dim() < 2 or cov.shape[-1] != cov.shape[-2]:
        raise ShapeError(f"inverse_sqrt: expected cov of shape (..., n, n), got {tuple(cov.shape)}.")
    if solver not in SOLVERS:
        raise ValueError(f"inverse_sqrt: expected solver one of {', '.join(map(repr, SOLVERS))}, got {solver!r}.")
    if num_iters < 1:
        raise ValueError(f"inverse_sqrt: expected num_iters >= 1, got {num_iters}. The published number is 5.")
    dtype = torch.promote_types(cov.dtype, torch.float32)
    with torch.autocast(cov.device.type, enabled=False):
        scaled, scale = _normalise(cov.to(dtype))
        root = _eigh(scaled) if solver == "eigh" else _newton_schulz(scaled, num_iters)
        return (root * scale.rsqrt()).to(cov.dtype)


def _normalise(cov: Tensor) -> tuple[Tensor, Tensor]:
    """cov divided by its Frobenius norm, and the norm; a zero matrix is divided by one.

    Dividing by the largest entry first keeps the squares inside the range of float32.
    """
    if cov.shape[-1] == 0:
        return cov, cov.new_ones(*cov.shape[:-2], 1, 1)
    largest = cov.detach().abs().amax((-2, -1), keepdim=True)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    norm = torch.linalg.matrix_norm(cov / largest, keepdim=True)
    norm = torch.where(norm > 0, norm, torch.ones_like(norm)) * largest
    return cov / norm, norm


def _newton_schulz(a: Tensor, num_iters: int) -> Tensor:
    """The coupled iteration, without the products whose factor is the identity or whose result is unused."""
    if a.is_cuda and num_iters > _MAX_ITERS_IN_TF32 and torch.get_float32_matmul_precision() != "highest":
        return _iterate(a.double(), num_iters).to(a.dtype)
    return _iterate(a, num_iters)


def _iterate(a: Tensor, num_iters: int) -> Tensor:
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    step = 1.5 * eye - 0.5 * a
    y, z = a, step
    for _ in range(num_iters - 1):
        y = y @ step
        step = 1.5 * eye - 0.5 * (z @ y)
        z = step @ z
    return z


def _eigh(a: Tensor) -> Tensor:
    try:
        root: Tensor = _ExactRoot.apply(a)
    except torch.linalg.LinAlgError as error:
        raise NumericalError(
            f"inverse_sqrt: the eigendecomposition of a {a.shape[-1]} x {a.shape[-1]} covariance failed ({error}). "
            "Raise eps, or use the solver 'newton_schulz'."
        ) from error
    return root


class _ExactRoot(torch.autograd.Function):
    """``Q diag(lambda)**-1/2 Q^T``, with a gradient that never divides by a difference of eigenvalues.

    With ``s = sqrt(lambda)``: ``dA = Q (F * (Q^T G Q)) Q^T``, ``F_ij = -1 / (s_i s_j (s_i + s_j))``, the
    divided difference of ``1 / s`` written without cancellation.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        # NaN in, NaN out, as from the iteration: on some sizes the decomposition of NaN raises, on others not.
        finite = a.isfinite().all(-1).all(-1)[..., None, None]
        values, vectors = torch.linalg.eigh(torch.where(finite, a, torch.zeros_like(a)))
        smallest = torch.finfo(a.dtype).eps * a.shape[-1]
        s = values.clamp(min=smallest).sqrt()
        ctx.save_for_backward(s, vectors)
        return torch.where(finite, (vectors / s.unsqueeze(-2)) @ vectors.mT, torch.full_like(a, torch.nan))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        s, vectors = ctx.saved_tensors
        rows, columns = s.unsqueeze(-1), s.unsqueeze(-2)
        factor = -1 / (rows * columns * (rows + columns))
        return vectors @ (factor * (vectors.mT @ grad @ vectors)) @ vectors.mT
