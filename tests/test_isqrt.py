"""The inverse root on matrices of known spectrum: value, symmetry, scale, gradient, and hard cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from netdeconv import NumericalError, ShapeError
from netdeconv import reference as ref
from netdeconv.functional import SOLVERS, inverse_sqrt

# float64, tens of products of matrices of order one, each rounding (1e-16) amplified by up to 1.5**30 = 2e5.
TIGHT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
# float32 against float64, relative to the largest entry: 6e-8 times the gain of five steps, 1.5**5, squared,
# times the square root of up to 64 summands; a margin of ten.
SINGLE = 3e-4


def spd(eigenvalues: Sequence[float] | Tensor, seed: int = 0, kind: torch.dtype = torch.float64) -> Tensor:
    """A symmetric matrix with these eigenvalues, along directions drawn at random."""
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    noise = torch.randn(len(values), len(values), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    vectors, _ = torch.linalg.qr(noise)
    matrix = (vectors * values) @ vectors.T
    return ((matrix + matrix.T) / 2).to(kind)


def log_uniform(n: int, condition: float) -> Tensor:
    return torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)


def symmetric(a: Tensor) -> Tensor:
    """Finite differences of single entries leave the symmetric matrices; this leads back."""
    return (a + a.mT) / 2


def root_of(cov: Tensor, solver: str) -> Tensor:
    """With 5 steps, or 15 for the solver that knows only these."""
    return inverse_sqrt(cov, num_iters=15 if solver == "quintic" else 5, solver=solver)


def close(actual: Tensor, expected: Tensor, **tolerance: Any) -> None:
    torch.testing.assert_close(actual, expected, **(tolerance or TIGHT))


# ---- value ------------------------------------------------------------------------------------------


def test_an_exact_root_known_by_hand() -> None:
    # Eigenvalues 9 and 1 along (1, 1) and (1, -1): the root has 1/3 and 1.
    cov = torch.tensor([[5.0, 4.0], [4.0, 5.0]], dtype=torch.float64)
    expected = torch.tensor([[2.0, -1.0], [-1.0, 2.0]], dtype=torch.float64) / 3
    close(inverse_sqrt(cov, solver="eigh"), expected)
    close(inverse_sqrt(cov, num_iters=20, solver="newton_schulz"), expected)


def test_one_and_two_newton_schulz_steps_by_hand() -> None:
    # |cov|_F = 5, a = diag(0.6, 0.8). One step: z = (3 - a) / 2 = diag(1.2, 1.1).
    cov = torch.diag(torch.tensor([3.0, 4.0], dtype=torch.float64))
    first = torch.diag(torch.tensor([1.2, 1.1], dtype=torch.float64)) / math.sqrt(5)
    close(inverse_sqrt(cov, num_iters=1), first)
    # Two, for a = 0.6: y = 0.72, t = (3 - 1.2 * 0.72) / 2 = 1.068, z = 1.2 * 1.068 = 1.2816.
    assert inverse_sqrt(cov, num_iters=2)[0, 0] == pytest.approx(1.2816 / math.sqrt(5), rel=1e-14)


@pytest.mark.parametrize("num_iters", [1, 2, 3, 5, 15])
@pytest.mark.parametrize(("n", "condition"), [(1, 1.0), (9, 1e1), (27, 1e3), (64, 1e5), (16, 1e7)])
def test_so_many_steps_are_those_of_the_reference(n: int, condition: float, num_iters: int) -> None:
    cov = spd(log_uniform(n, condition))
    expected = ref.newton_schulz(cov, num_iters)
    close(inverse_sqrt(cov, num_iters=num_iters, solver="newton_schulz"), expected)
    if num_iters <= 5:
        single = inverse_sqrt(cov.float(), num_iters=num_iters, solver="newton_schulz").double()
        assert (single - expected).abs().max() <= SINGLE * expected.abs().max()


@pytest.mark.parametrize("num_iters", [1, 5, 12])
def test_every_eigenvalue_gets_the_gain_of_the_scalar_iteration(num_iters: int) -> None:
    eigenvalues = log_uniform(6, 1e6)
    norm = float(eigenvalues.norm())
    gains = [ref.ns_gain(float(value) / norm, num_iters) / math.sqrt(norm) for value in eigenvalues]
    close(inverse_sqrt(spd(eigenvalues), num_iters=num_iters, solver="newton_schulz"), spd(gains))


@pytest.mark.parametrize("num_iters", [1, 2, 3])
def test_few_steps_whiten_less(num_iters: int) -> None:
    """The condition of what is whitened falls with every step, and is above that of five."""
    cov = spd(log_uniform(8, 1e4))
    conditions = []
    for steps in (num_iters, num_iters + 1, 5):
        root = inverse_sqrt(cov, num_iters=steps)
        conditions.append(float(torch.linalg.cond(root @ cov @ root)))
    assert float(torch.linalg.cond(cov)) > conditions[0] > conditions[1] > conditions[2]
    largest = float(torch.linalg.matrix_norm(inverse_sqrt(cov, num_iters=num_iters), 2))
    assert largest * math.sqrt(float(torch.linalg.matrix_norm(cov))) <= 1.5**num_iters


@pytest.mark.parametrize("num_iters", [1, 2, 3])
def test_the_gradient_of_few_steps_is_that_of_finite_differences(num_iters: int) -> None:
    cov = spd([1.0, 0.5, 0.5, 1e-2]).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: inverse_sqrt(symmetric(a), num_iters=num_iters), cov)
    assert torch.autograd.gradgradcheck(lambda a: inverse_sqrt(symmetric(a), num_iters=num_iters), cov)


def test_five_steps_do_not_whiten_and_many_do() -> None:
    cov = spd(log_uniform(8, 1e4))
    exact = ref.exact_inverse_sqrt(cov)
    for solver in ("newton_schulz", "chebyshev", "auto"):
        assert (inverse_sqrt(cov, solver=solver) - exact).abs().max() > 1
    close(inverse_sqrt(cov, num_iters=30), exact)


@pytest.mark.parametrize(("n", "condition"), [(1, 1.0), (8, 1e2), (64, 1e4), (16, 1e6)])
def test_the_exact_root_whitens(n: int, condition: float) -> None:
    cov = spd(log_uniform(n, condition))
    root = inverse_sqrt(cov, solver="eigh")
    close(root @ cov @ root, torch.eye(n, dtype=torch.float64))
    close(root, ref.exact_inverse_sqrt(cov))


@pytest.mark.parametrize("solver", ["newton_schulz", "eigh"])
def test_a_multiple_of_the_identity(solver: str) -> None:
    for size, value in ((1, 16.0), (4, 1.0), (4, 1e-5)):
        cov = value * torch.eye(size, dtype=torch.float64)
        expected = torch.eye(size, dtype=torch.float64) / math.sqrt(value)
        close(inverse_sqrt(cov, num_iters=15, solver=solver), expected)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_batch_is_one_after_the_other(solver: str) -> None:
    covs = torch.stack([spd(log_uniform(5, 100.0), seed) * 10.0**seed for seed in range(6)]).reshape(2, 3, 5, 5)
    roots = root_of(covs, solver)
    assert roots.shape == covs.shape
    for place in torch.ones(2, 3).nonzero().tolist():
        close(roots[tuple(place)], root_of(covs[tuple(place)], solver))
    assert root_of(covs[:0], solver).shape == (0, 3, 5, 5)
    assert root_of(covs[..., :0, :0], solver).shape == (2, 3, 0, 0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_the_root_is_symmetric(solver: str, kind: torch.dtype) -> None:
    root = root_of(spd(log_uniform(64, 1e4), kind=kind), solver)
    # rounding of the products, amplified as in SINGLE
    assert (root - root.mT).abs().max() <= 1e3 * torch.finfo(kind).eps * root.abs().max()


# ---- scale, type ------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_scaling_the_covariance_scales_the_root(solver: str, kind: torch.dtype) -> None:
    cov = spd(log_uniform(9, 1e3), kind=kind)
    root = root_of(cov, solver)
    for exponent in range(-12, 13, 3):
        scaled = root_of(cov * 10.0**exponent, solver) * 10.0 ** (exponent / 2)
        # rounding of the scaled matrix, times its condition
        close(scaled, root, rtol=0, atol=1e3 * torch.finfo(kind).eps * float(root.abs().max()))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e10, 1e20, 1e30])
def test_squares_beyond_the_range_of_float32_do_no_harm(solver: str, scale: float) -> None:
    cov = spd([1.0, 0.5, 0.25], kind=torch.float32)
    expected = root_of(cov, solver)
    close(root_of(cov * scale, solver) * math.sqrt(scale), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(solver: str, kind: torch.dtype) -> None:
    cov = spd([1.0, 0.5, 0.25]).to(kind)
    root = root_of(cov, solver)
    assert root.dtype == kind
    assert torch.equal(root, root_of(cov.float(), solver).to(kind))


@pytest.mark.parametrize("solver", SOLVERS)
def test_autocast_does_not_reach_it(solver: str) -> None:
    cov = spd(log_uniform(8, 1e2), kind=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        cast = root_of(cov, solver)
    assert torch.equal(cast, root_of(cov, solver))


# ---- matrices that are no covariance, or hardly ------------------------------------------------------


def largest_gain(solver: str, n: int, kind: torch.dtype) -> float:
    """Of the steps, or of an eigenvalue at the rounding error."""
    if solver == "eigh":
        return (torch.finfo(kind).eps * n) ** -0.5
    return 1.5**15 if solver == "quintic" else 1.5**5


def bound(solver: str, cov: Tensor) -> float:
    """What no entry of the root may exceed."""
    norm = float(torch.linalg.matrix_norm(cov))
    return largest_gain(solver, len(cov), cov.dtype) / math.sqrt(norm)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_zero_matrix_gives_a_finite_multiple_of_the_identity(solver: str) -> None:
    cov = torch.zeros(2, 3, 3, requires_grad=True)
    root = root_of(cov, solver)
    worst = largest_gain(solver, 3, torch.float32)
    close(root.detach(), worst * torch.eye(3).expand(2, 3, 3), rtol=2e-2, atol=0)  # the fit of "quintic"
    root.sum().backward()
    assert cov.grad is not None
    assert bool(cov.grad.isfinite().all())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("below", [0.0, -1e-7, -1e-3])
def test_slightly_indefinite_and_rank_deficient_matrices_stay_bounded(
    solver: str, kind: torch.dtype, below: float
) -> None:
    if solver == "quintic" and below == -1e-3:
        below = -1e-6  # 15 steps multiply it by 1.5**30 = 2e5, and diverge where that is more than 1
    cov = spd([1.0, 0.5, 0.1, 0.0, below, below], kind=kind).requires_grad_()
    root = root_of(cov, solver)
    largest = float(torch.linalg.matrix_norm(root.detach(), 2))
    assert largest <= 1.2 * bound(solver, cov.detach())  # a negative eigenvalue grows a little faster than zero
    root.sum().backward()
    assert cov.grad is not None
    assert bool(cov.grad.isfinite().all())


@pytest.mark.parametrize("solver", ["newton_schulz", "quintic", "eigh"])
def test_fewer_samples_than_dimensions(solver: str) -> None:
    rows = torch.randn(15, 64, generator=torch.Generator().manual_seed(0))
    cov = rows.T @ rows / 15
    root = inverse_sqrt(cov + 1e-5 * torch.eye(64), solver=solver, num_iters=15)
    white = torch.linalg.eigvalsh(root @ cov @ root)
    assert bool(white.isfinite().all())
    assert bool((white[:49].abs() < 1e-2).all())  # nothing was there to whiten
    close(white[49:], torch.ones(15), rtol=0, atol=3e-2)  # and the rest is white, but for the fit of "quintic"


# ---- gradient ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "eigenvalues",
    [
        [1.0, 0.5, 0.1],
        [1.0, 1.0, 1.0],
        [1.0, 1.0, 0.2],
        [1.0, 1.0 - 1e-12, 0.5],
        [0.7, 0.7 + 1e-7, 0.7 - 1e-7],
        [1.0, 1e-2, 1e-3],
    ],
    ids=str,
)
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_gradient_is_that_of_finite_differences(solver: str, eigenvalues: list[float]) -> None:
    cov = spd(eigenvalues).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: root_of(symmetric(a), solver), cov)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_gradient_of_a_batch(solver: str) -> None:
    covs = torch.stack([spd([3.0, 1.0]), 100 * spd([1.0, 1.0], seed=1)]).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: root_of(symmetric(a), solver), covs)


def test_the_converged_iteration_has_the_gradient_of_the_exact_root() -> None:
    cov, along = spd([1.0, 0.5, 0.3]), spd([1.0, -2.0, 3.0], seed=1)
    grads = []
    for options in ({"solver": "eigh"}, {"num_iters": 20, "solver": "newton_schulz"}):
        leaf = cov.clone().requires_grad_()
        (inverse_sqrt(symmetric(leaf), **options) * along).sum().backward()  # type: ignore[arg-type]
        assert leaf.grad is not None
        grads.append(leaf.grad)
    close(grads[0], grads[1])


def test_second_derivatives_exist_for_the_iteration_and_are_refused_for_the_exact_root() -> None:
    cov = spd([1.0, 0.5]).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda a: inverse_sqrt(symmetric(a), num_iters=3), cov)
    (grad,) = torch.autograd.grad(inverse_sqrt(cov, solver="eigh").sum(), cov, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (4, 3, 2)])
def test_a_matrix_must_be_square(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"^inverse_sqrt: expected cov of shape \(\.\.\., n, n\), got \("):
        inverse_sqrt(torch.zeros(shape))


def test_an_unknown_solver_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"expected solver one of 'auto', 'newton_schulz', .*'eigh', got 'svd'"):
        inverse_sqrt(torch.eye(2), solver="svd")


@pytest.mark.parametrize("num_iters", [0, -1])
def test_there_is_at_least_one_step(num_iters: int) -> None:
    with pytest.raises(ValueError, match=rf"expected num_iters >= 1, got {num_iters}\. The published number is 5"):
        inverse_sqrt(torch.eye(2), num_iters=num_iters)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("n", [1, 2, 3, 8, 27])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_not_finite_gives_nan_and_leaves_the_rest_of_the_batch_alone(
    solver: str, n: int, poison: float
) -> None:
    covs = torch.stack([spd(log_uniform(n, 10.0)) for _ in range(2)])
    expected = root_of(covs, solver)
    covs[1, 0, 0] = poison
    roots = root_of(covs, solver)
    close(roots[0], expected[0])
    assert bool(roots[1].isnan().any())


def test_a_decomposition_that_fails_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(a: Tensor) -> Tensor:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    match = r"eigendecomposition of a 2 x 2 covariance failed \(did not converge\)\. Raise eps, or use the solver"
    with pytest.raises(NumericalError, match=match):
        inverse_sqrt(torch.eye(2), solver="eigh")
