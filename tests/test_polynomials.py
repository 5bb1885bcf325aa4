"""Solvers that stand for so many Newton-Schulz steps: how near their map is, and which one is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from netdeconv import ConfigError, WhiteningConfig
from netdeconv import reference as ref
from netdeconv.functional import inverse_sqrt
from netdeconv.functional.isqrt import chosen_solver
from netdeconv.functional.polynomials import chebyshev, newton_schulz, quintics
from netdeconv.functional.tracing import without_caching

# Largest relative error of the gain over all eigenvalues, as stated beside the coefficients. One step is linear and two
# are of degree 4: the polynomial is the map itself, and rounding is a few times 1e-16.
EXACT = 1e-13
FIT = {("chebyshev", 1): EXACT, ("chebyshev", 2): EXACT, ("chebyshev", 3): 1.6e-4, ("chebyshev", 4): 4e-4,
       ("chebyshev", 5): 2e-4, ("quintic", 15): 1.1e-2}  # fmt: skip
# Matrix products that they take, and that the steps take.
PRODUCTS = {1: (0, 0), 2: (2, 3), 3: (3, 6), 4: (4, 9), 5: (6, 12), 15: (17, 42)}
MAPS = {"chebyshev": chebyshev, "quintic": quintics}

every_fit = pytest.mark.parametrize(("solver", "num_iters"), FIT)


def grid() -> Tensor:
    """Eigenvalues in (0, 1], dense at both ends."""
    small = torch.logspace(-9, 0, 2000, dtype=torch.float64)
    return torch.cat([small, torch.linspace(1e-3, 1, 2001, dtype=torch.float64)])


def gains(a: Tensor, num_iters: int) -> Tensor:
    return torch.tensor([ref.ns_gain(float(value), num_iters) for value in a], dtype=torch.float64)


@every_fit
def test_the_gain_is_that_of_the_steps_for_every_eigenvalue(solver: str, num_iters: int) -> None:
    a, tolerance = grid(), FIT[solver, num_iters]
    ours = MAPS[solver](a.reshape(-1, 1, 1), torch.ones(len(a), 1, 1, dtype=a.dtype), num_iters).flatten()
    error = float((ours / gains(a, num_iters) - 1).abs().max())
    assert (0 if tolerance == EXACT else tolerance / 2) <= error < tolerance
    # One step more or fewer is another map altogether.
    for other in (num_iters - 1, num_iters + 1):
        assert float((ours / gains(a, other) - 1).abs().max()) > 0.3


@every_fit
def test_term_by_term_is_in_one_pass(solver: str, num_iters: int) -> None:
    x, eye = torch.rand(7, 3, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64).expand(7, 3, 3)
    a = x @ x.mT / torch.linalg.matrix_norm(x @ x.mT, keepdim=True)
    together = MAPS[solver](a, eye, num_iters)
    with without_caching():
        torch.testing.assert_close(MAPS[solver](a, eye, num_iters), together)


@every_fit
@pytest.mark.parametrize(("n", "condition"), [(1, 1.0), (9, 1e2), (64, 1e5)])
def test_the_root_of_a_matrix_is_that_of_the_steps(solver: str, num_iters: int, n: int, condition: float) -> None:
    tolerance = FIT[solver, num_iters]
    noise = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    vectors, _ = torch.linalg.qr(noise)
    cov = 7 * (vectors * torch.logspace(0, -torch.log10(torch.tensor(condition)), n, dtype=torch.float64)) @ vectors.T
    cov = (cov + cov.T) / 2
    expected = ref.newton_schulz(cov, num_iters)
    # All are polynomials in cov: the difference has the eigenvalues' errors, each relative to its gain.
    relative = torch.linalg.solve(expected, inverse_sqrt(cov, num_iters=num_iters, solver=solver)) - torch.eye(n)
    assert float(torch.linalg.matrix_norm(relative, 2)) < 1.01 * tolerance
    single = inverse_sqrt(cov.float(), num_iters=num_iters, solver=solver).double()
    rounding = 1e-5  # of float32, 6e-8, times gains of up to 1.5**5 squared; for 15 steps below the fit
    assert float((single - expected).abs().max()) < (2 * tolerance + rounding) * float(expected.abs().max())


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm")
        return func(*args, **(kwargs or {}))


@every_fit
def test_the_number_of_products(solver: str, num_iters: int) -> None:
    a = torch.eye(3) / 3**0.5
    counts = []
    for taken in (MAPS[solver], newton_schulz):
        with without_caching(), Products() as products:
            taken(a, torch.eye(3), num_iters)
        counts.append(products.count)
    assert tuple(counts) == PRODUCTS[num_iters]


@pytest.mark.parametrize(
    ("num_iters", "taken"),
    [(1, "chebyshev"), (2, "chebyshev"), (3, "chebyshev"), (4, "chebyshev"), (5, "chebyshev"), (6, "newton_schulz"),
     (15, "quintic")],
)  # fmt: skip
def test_auto_takes_what_fits_the_number_of_steps(num_iters: int, taken: str) -> None:
    cov = torch.tensor([[2.0, 0.5], [0.5, 0.3]], dtype=torch.float64)
    expected = inverse_sqrt(cov, num_iters=num_iters, solver=taken)
    assert torch.equal(inverse_sqrt(cov, num_iters=num_iters), expected)
    assert torch.equal(inverse_sqrt(cov, num_iters=num_iters, solver="auto"), expected)
    assert chosen_solver("auto", num_iters) == taken
    if FIT.get((taken, num_iters), 0) > EXACT:
        assert not torch.equal(inverse_sqrt(cov, num_iters=num_iters, solver="newton_schulz"), expected)


@pytest.mark.parametrize(("solver", "known"), [("chebyshev", "1 or 2 or 3 or 4 or 5"), ("quintic", "15")])
def test_a_number_of_steps_without_coefficients_is_refused(solver: str, known: str) -> None:
    match = rf"expected num_iters={known} with solver='{solver}', got 7\. Use solver='auto' for any number of steps"
    with pytest.raises(ValueError, match=rf"^inverse_sqrt: {match}"):
        inverse_sqrt(torch.eye(2), num_iters=7, solver=solver)
    with pytest.raises(ConfigError, match=rf"^WhiteningConfig: .*{match}"):
        WhiteningConfig(num_iters=7, solver=solver)
    for num_iters in map(int, known.split(" or ")):
        assert WhiteningConfig(num_iters=num_iters, solver=solver).solver == solver


def test_a_solver_is_refused_where_one_kind_of_layer_has_another_number_of_steps() -> None:
    with pytest.raises(
        ConfigError, match=r"^WhiteningConfig: expected num_iters=15 with solver='quintic', got [135]\."
    ):
        WhiteningConfig(solver="quintic")
    assert WhiteningConfig(solver="chebyshev").num_iters is None
