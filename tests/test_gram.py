"""The root from few rows is the root of their covariance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from netdeconv import ShapeError, WhitenedLinear, WhiteningConfig
from netdeconv.functional import Blocks, Window, inverse_sqrt, inverse_sqrt_of_rows, patch_moments


def drawn(rows: int, features: int, dtype: torch.dtype = torch.float64) -> Tensor:
    draw = torch.Generator().manual_seed(rows)
    mixing = torch.randn(features, features, generator=draw, dtype=torch.float64) / features**0.5
    return (torch.randn(rows, features, generator=draw, dtype=torch.float64) @ mixing).to(dtype)


def by_the_covariance(rows: Tensor, eps: float, num_iters: int, solver: str = "newton_schulz") -> Tensor:
    cov = rows.mT @ rows + eps * torch.eye(rows.shape[1], dtype=rows.dtype)
    return inverse_sqrt(cov, num_iters=num_iters, solver=solver)


@pytest.mark.parametrize("num_iters", [1, 2, 5, 15])
@pytest.mark.parametrize(("rows", "features"), [(1, 3), (4, 9), (7, 7), (5, 4)])
@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.3])
def test_it_is_the_root_of_the_covariance(rows: int, features: int, num_iters: int, eps: float) -> None:
    x = drawn(rows, features)
    root = inverse_sqrt_of_rows(x, eps=eps, num_iters=num_iters, solver="newton_schulz")
    torch.testing.assert_close(root, by_the_covariance(x, eps, num_iters), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("solver", "num_iters"),
    [*(("chebyshev", n) for n in (1, 2, 3, 5)), *(("auto", n) for n in (1, 2, 3, 5, 7)), ("quintic", 15)],
)
def test_every_iteration_runs_on_the_rows(solver: str, num_iters: int) -> None:
    x = drawn(4, 9)
    root = inverse_sqrt_of_rows(x, eps=1e-3, num_iters=num_iters, solver=solver)
    torch.testing.assert_close(root, by_the_covariance(x, 1e-3, num_iters, solver), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("num_iters", [1, 3, 5])
@pytest.mark.parametrize("solver", ["newton_schulz", "chebyshev"])
def test_the_gradient_is_that_of_the_root_of_the_covariance(solver: str, num_iters: int) -> None:
    x, weights = drawn(4, 9).requires_grad_(), drawn(9, 9)
    (mine,) = torch.autograd.grad(
        (inverse_sqrt_of_rows(x, eps=1e-3, num_iters=num_iters, solver=solver) * weights).sum(), x
    )
    (known,) = torch.autograd.grad((by_the_covariance(x, 1e-3, num_iters, solver) * weights).sum(), x)
    torch.testing.assert_close(mine, known, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e10])
def test_scale_goes_out_by_its_inverse(scale: float) -> None:
    x = drawn(16, 64, torch.float32)
    root = inverse_sqrt_of_rows(x * scale, eps=0.0) * scale
    torch.testing.assert_close(root, inverse_sqrt_of_rows(x, eps=0.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-20, 1e-12, 1e-5, 1e-2, 1e8])
@pytest.mark.parametrize("constant", [False, True])
def test_eps_beside_rows_of_any_size(scale: float, constant: bool) -> None:
    x = drawn(4, 16, torch.float32) * scale
    if constant:
        x = (x[:1] * 1e-3).repeat(4, 1)
    root = inverse_sqrt_of_rows(x, eps=1e-5)
    known = by_the_covariance(x.double(), 1e-5, 5, "chebyshev")
    torch.testing.assert_close(root.double(), known, rtol=1e-3, atol=1e-9)


def test_zeros_without_eps_have_a_finite_gradient() -> None:
    x = torch.zeros(3, 16, requires_grad=True)
    inverse_sqrt_of_rows(x, eps=0.0).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def test_what_cannot_be_is_refused_in_words() -> None:
    for wrong in (torch.ones(3), torch.ones(0, 3), torch.ones(3, 0)):
        with pytest.raises(ShapeError, match="at least one of each"):
            inverse_sqrt_of_rows(wrong, eps=1e-5)
    with pytest.raises(ValueError, match="num_iters >= 1, got 0"):
        inverse_sqrt_of_rows(torch.ones(2, 3), eps=1e-5, num_iters=0)
    with pytest.raises(ValueError, match="a solver that iterates, got 'eigh'"):
        inverse_sqrt_of_rows(torch.ones(2, 3), eps=1e-5, solver="eigh")


def test_rows_of_zeros_give_a_multiple_of_the_identity() -> None:
    # |eps I| = 2 eps: relative eigenvalue 1/2; one step has the gain 1.5 - 0.5 / 2 = 1.25.
    root = inverse_sqrt_of_rows(torch.zeros(2, 4, dtype=torch.float64), eps=1e-2, num_iters=1)
    torch.testing.assert_close(root, torch.eye(4, dtype=torch.float64) * 1.25 / 0.02**0.5)
    assert bool(inverse_sqrt_of_rows(torch.zeros(2, 4), eps=0.0).isfinite().all())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_half_precision_and_autocast_do_not_reach_it(kind: torch.dtype) -> None:
    x = drawn(3, 8, kind)
    with torch.autocast("cpu", torch.bfloat16):
        root = inverse_sqrt_of_rows(x, eps=1e-5)
    assert root.dtype == torch.float32
    assert torch.equal(root, inverse_sqrt_of_rows(x.float(), eps=1e-5))


@pytest.mark.parametrize(
    ("block_size", "rows", "shapes"),
    [(512, 4, [(4, 18)]), (512, 5, [(18, 18)]), (12, 1, [(1, 12), (1, 6)]), (8, 1, [(2, 8), (2, 2)])],
)
def test_the_factor_is_that_of_the_covariance(block_size: int, rows: int, shapes: list[tuple[int, int]]) -> None:
    blocks, x = Blocks.plan(18, Window(), 1, block_size, "contiguous"), drawn(rows, 18) + 3
    short, full = patch_moments(x, blocks, factored=True), patch_moments(x, blocks)
    assert [tuple(cov.shape) for cov in short.covs] == shapes
    for cov, known in zip(short.covs, full.covs, strict=True):
        torch.testing.assert_close(cov if len(cov) == len(known) else cov.mT @ cov, known)
    torch.testing.assert_close(short.mean, full.mean)


def test_no_factor_with_weights_or_groups() -> None:
    x = drawn(1, 8)
    for groups, weights in ((1, torch.ones(1, dtype=x.dtype)), (2, None)):
        blocks = Blocks.plan(8, Window(), groups, 8, "contiguous")
        (cov,) = patch_moments(x, blocks, weights, factored=True).covs
        assert tuple(cov.shape) == blocks.root_shapes[0]


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("block_size", [512, 8])
def test_a_layer_of_few_rows_is_one_of_many(paper: bool, rows: int, block_size: int) -> None:
    # Twice the same rows have the same mean and covariance, but are too many for the short way.
    config = WhiteningConfig.paper() if paper else WhiteningConfig(solver="newton_schulz")
    layer = WhitenedLinear(12, 3, whitening=config.replace(block_size=block_size)).double()
    x, target = drawn(rows, 12) + 1, drawn(rows, 3)
    results = []
    for times in (1, 4):
        layer.whitening.reset_statistics()
        layer.zero_grad()
        (layer(x.repeat(times, 1)) * target.repeat(times, 1)).sum().div(times).backward()
        results.append([layer.weight.grad, layer.bias.grad, layer.whitening.running_root.clone()])
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-8)
