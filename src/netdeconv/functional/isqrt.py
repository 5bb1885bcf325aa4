"""The inverse square root of a covariance: the whitening matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from netdeconv.errors import NumericalError, ShapeError
from netdeconv.functional.polynomials import CHEBYSHEV, QUINTICS, chebyshev, newton_schulz, quintics
from netdeconv.functional.precision import without_autocast

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SOLVERS", "chosen_solver", "inverse_sqrt", "solves_by_chebyshev"]

SOLVERS = ("auto", "newton_schulz", "chebyshev", "quintic", "eigh")
"""Ways to compute the inverse square root, see :func:`inverse_sqrt`."""

# Above this many steps rounding in the products is amplified by more than 1.5**(2 * 8) = 657, which TF32's
# 1e-3 is too coarse for.
_MAX_ITERS_IN_TF32 = 8


def inverse_sqrt(cov: Tensor, *, num_iters: int = 5, solver: str = "auto") -> Tensor:
    """Symmetric ``D`` with ``D cov D`` near the identity, for one matrix or a batch of them.

    ``"newton_schulz"`` takes ``num_iters`` steps of the coupled iteration ``T = (3 I - Z Y) / 2``,
    ``Y <- Y T``, ``Z <- T Z`` from ``Y = cov / |cov|_F``, ``Z = I``, and returns ``Z / sqrt(|cov|_F)``. Its
    gain for an eigenvalue of relative size a is near ``1 / sqrt(a)`` but never above ``1.5**num_iters``: few steps
    regularise, and whiten large eigenvalues only. In float32 the cap holds up to about 15 steps; more amplify
    eigenvalues that rounding has made negative.

    ``"chebyshev"`` computes the same map for 1 to 5 steps with 0, 2, 3, 4 or 6 matrix products in place of 0, 3, 6, 9
    or 12, by a polynomial: that of the steps for 1 and 2, otherwise one whose gain is within 4e-4 of theirs;
    ``"quintic"`` the one for 15 steps with 17 in place of 42, within 1.1e-2. ``"auto"`` takes these where they apply,
    and Newton-Schulz for other numbers of steps.

    ``"eigh"`` gives the exact root and ignores ``num_iters``; eigenvalues below rounding are treated as rounding
    errors.

    Shapes: cov ``(..., n, n)``, symmetric positive semi-definite -> ``(..., n, n)``, same dtype; half
    precision is computed in float32. Scaling cov by c scales the result by ``c**-0.5``. A zero matrix gives a
    finite multiple of the identity.

    Differentiable: Newton-Schulz any number of times, ``"eigh"`` once, by a formula that stays finite for
    equal eigenvalues.

    Raises:
        ShapeError: cov is not square.
        TypeError: cov is not floating point.
        ValueError: an unknown solver, num_iters < 1, or a solver without coefficients for num_iters.
        NumericalError: the eigendecomposition failed.

    Source: Ye et al. 2020, section 3.3; Denman and Beavers 1976; Higham, Functions of Matrices, chapter 6.
    """
    if cov.dim() < 2 or cov.shape[-1] != cov.shape[-2]:
        raise ShapeError(
            f"inverse_sqrt: expected cov of shape (..., n, n), got {tuple(cov.shape)}. Pass square matrices."
        )
    if not cov.is_floating_point():
        raise TypeError(f"inverse_sqrt: expected a floating point cov, got {cov.dtype}. Pass cov.float().")
    if solver not in SOLVERS:
        raise ValueError(f"inverse_sqrt: expected solver one of {', '.join(map(repr, SOLVERS))}, got {solver!r}.")
    if num_iters < 1:
        raise ValueError(f"inverse_sqrt: expected num_iters >= 1, got {num_iters}. The published number is 5.")
    solver = chosen_solver(solver, num_iters)
    dtype = torch.promote_types(cov.dtype, torch.float32)
    with without_autocast(cov.device.type):
        scaled, scale = _normalise(cov.to(dtype))
        root = _eigh(scaled) if solver == "eigh" else _iterated_matrix(scaled, num_iters, solver)
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


def chosen_solver(solver: str, num_iters: int) -> str:
    """The solver that computes the root.

    Raises:
        ValueError: the solver has no coefficients for this number of steps.
    """
    if solver == "auto":
        return "chebyshev" if num_iters in CHEBYSHEV else "quintic" if num_iters in QUINTICS else "newton_schulz"
    for name, table in (("chebyshev", CHEBYSHEV), ("quintic", QUINTICS)):
        if solver == name and num_iters not in table:
            known = " or ".join(map(str, table))
            raise ValueError(
                f"inverse_sqrt: expected num_iters={known} with solver={name!r}, got {num_iters}. "
                "Use solver='auto' for any number of steps."
            )
    return solver


def solves_by_chebyshev(solver: str, num_iters: int | None) -> bool:
    """Whether these settings mean the polynomial of ``"chebyshev"``."""
    return num_iters in CHEBYSHEV and chosen_solver(solver, num_iters) == "chebyshev"


def iterated(a: Tensor, eye: Tensor, num_iters: int, solver: str) -> Tensor:
    """The map of one of the iterations; for what a and eye may be see :func:`polynomials.newton_schulz`."""
    return {"chebyshev": chebyshev, "quintic": quintics, "newton_schulz": newton_schulz}[solver](a, eye, num_iters)


def too_many_for_tf32(a: Tensor, num_iters: int) -> bool:
    """Whether products of this tensor may run in TF32, and that is too rough for so many steps."""
    return a.is_cuda and num_iters > _MAX_ITERS_IN_TF32 and torch.get_float32_matmul_precision() != "highest"


def _iterated_matrix(a: Tensor, num_iters: int, solver: str) -> Tensor:
    exact = a.double() if too_many_for_tf32(a, num_iters) else a
    exact = exact if a.dim() == 2 else exact.flatten(0, -3)
    eye = torch.eye(a.shape[-1], dtype=exact.dtype, device=a.device).expand_as(exact)
    root = iterated(exact, eye, num_iters, solver)
    return root.to(a.dtype).reshape(a.shape)


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
