"""Solvers that stand for so many Newton-Schulz steps: how near their map is, and which one is taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from netdeconv import ConfigError, WhiteningConfig
from netdeconv import reference as ref
from netdeconv.functional import inverse_sqrt
from netdeconv.functional.constants import without_caching
from netdeconv.functional.polynomials import chebyshev, quintics

# Largest relative error of the gain over all eigenvalues, as stated beside the coefficients.
FIT = {"chebyshev": (5, 2e-4), "quintic": (15, 1.1e-2)}
MAPS = {"chebyshev": chebyshev, "quintic": quintics}

every_fit = pytest.mark.parametrize("solver", FIT)


def grid() -> Tensor:
    """Eigenvalues in (0, 1], dense at both ends."""
    small = torch.logspace(-9, 0, 2000, dtype=torch.float64)
    return torch.cat([small, torch.linspace(1e-3, 1, 2001, dtype=torch.float64)])


@every_fit
def test_the_gain_is_that_of_the_steps_for_every_eigenvalue(solver: str) -> None:
    num_iters, tolerance = FIT[solver]
    a = grid()
    known = torch.tensor([ref.ns_gain(float(value), num_iters) for value in a], dtype=torch.float64)
    ours = MAPS[solver](a.reshape(-1, 1, 1), torch.ones(len(a), 1, 1, dtype=a.dtype), num_iters).flatten()
    error = float((ours / known - 1).abs().max())
    assert tolerance / 2 < error < tolerance
    # One step more or fewer is another map altogether.
    for other in (num_iters - 1, num_iters + 1):
        elsewhere = torch.tensor([ref.ns_gain(float(value), other) for value in a], dtype=torch.float64)
        assert float((ours / elsewhere - 1).abs().max()) > 0.3


@every_fit
def test_term_by_term_is_in_one_pass(solver: str) -> None:
    x, eye = torch.rand(7, 3, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64).expand(7, 3, 3)
    a = x @ x.mT / torch.linalg.matrix_norm(x @ x.mT, keepdim=True)
    together = MAPS[solver](a, eye, FIT[solver][0])
    with without_caching():
        torch.testing.assert_close(MAPS[solver](a, eye, FIT[solver][0]), together)


@every_fit
@pytest.mark.parametrize(("n", "condition"), [(1, 1.0), (9, 1e2), (64, 1e5)])
def test_the_root_of_a_matrix_is_that_of_the_steps(solver: str, n: int, condition: float) -> None:
    num_iters, tolerance = FIT[solver]
    noise = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    vectors, _ = torch.linalg.qr(noise)
    cov = 7 * (vectors * torch.logspace(0, -torch.log10(torch.tensor(condition)), n, dtype=torch.float64)) @ vectors.T
    cov = (cov + cov.T) / 2
    expected = ref.newton_schulz(cov, num_iters)
    # All are polynomials in cov: the difference has the eigenvalues' errors, each relative to its gain.
    relative = torch.linalg.solve(expected, inverse_sqrt(cov, num_iters=num_iters, solver=solver)) - torch.eye(n)
    assert float(torch.linalg.matrix_norm(relative, 2)) < 1.01 * tolerance
    single = inverse_sqrt(cov.float(), num_iters=num_iters, solver=solver).double()
    assert float((single - expected).abs().max()) < 2 * tolerance * float(expected.abs().max())


@pytest.mark.parametrize(
    ("num_iters", "taken"), [(1, "newton_schulz"), (5, "chebyshev"), (6, "newton_schulz"), (15, "quintic")]
)
def test_auto_takes_what_fits_the_number_of_steps(num_iters: int, taken: str) -> None:
    cov = torch.tensor([[2.0, 0.5], [0.5, 0.3]], dtype=torch.float64)
    expected = inverse_sqrt(cov, num_iters=num_iters, solver=taken)
    assert torch.equal(inverse_sqrt(cov, num_iters=num_iters), expected)
    assert torch.equal(inverse_sqrt(cov, num_iters=num_iters, solver="auto"), expected)
    if taken != "newton_schulz":
        assert not torch.equal(inverse_sqrt(cov, num_iters=num_iters, solver="newton_schulz"), expected)


@every_fit
def test_a_number_of_steps_without_coefficients_is_refused(solver: str) -> None:
    known = FIT[solver][0]
    match = rf"expected num_iters={known} with solver='{solver}', got 7\. Use solver='auto' for any number of steps"
    with pytest.raises(ValueError, match=rf"^inverse_sqrt: {match}"):
        inverse_sqrt(torch.eye(2), num_iters=7, solver=solver)
    with pytest.raises(ConfigError, match=rf"^WhiteningConfig: .*{match}"):
        WhiteningConfig(num_iters=7, solver=solver)
    assert WhiteningConfig(num_iters=known, solver=solver).solver == solver
