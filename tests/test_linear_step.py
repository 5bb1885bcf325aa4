"""A training step of a linear layer as one autograd node: the same as from the operators it stands for."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from netdeconv import NonFiniteWarning, WhitenedLinear, WhiteningConfig
from netdeconv.functional import Blocks, Window, fold, inverse_sqrt, patch_moments, whitened_linear
from netdeconv.functional.polynomials import CHEBYSHEV, chebyshev, chebyshev_gradient, chebyshev_stages
from netdeconv.nn import Whitening

# float64: a few hundred operations, gains up to 7.6.
CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


def correlated(rows: int, features: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, dtype=torch.float64, generator=generator)
    return (x @ torch.randn(features, features, dtype=torch.float64, generator=generator) + 2).requires_grad_()


@pytest.mark.parametrize("num_iters", CHEBYSHEV)
def test_the_gradient_of_the_polynomial_is_that_of_its_operators(num_iters: int) -> None:
    a, g = (m.detach().T @ m.detach() for m in (correlated(9, 6), correlated(9, 6, seed=1)))
    a = (a / a.norm()).requires_grad_()
    eye = torch.eye(6, dtype=torch.float64)
    (expected,) = torch.autograd.grad(chebyshev(a, eye, num_iters), a, g)
    with torch.no_grad():
        found = chebyshev_gradient(g, *chebyshev_stages(a, eye, num_iters), num_iters)
    torch.testing.assert_close(found, (expected + expected.T) / 2, **CLOSE)


@pytest.mark.parametrize("num_iters", CHEBYSHEV)
@pytest.mark.parametrize("biased", [True, False])
def test_it_is_moments_root_and_fold(num_iters: int, biased: bool) -> None:
    x, weight = correlated(30, 7), correlated(4, 7, seed=1)
    bias = torch.randn(4, dtype=torch.float64).requires_grad_() if biased else None
    blocks = Blocks.plan(7, Window(), 1, 512, "contiguous")
    moments = patch_moments(x, blocks)
    root = inverse_sqrt(moments.covs[0] + 1e-3 * torch.eye(7), num_iters=num_iters)
    expected = F.linear(x, *fold(weight, bias, moments.mean, [root], blocks))
    y, *found, _ = whitened_linear(x, weight, bias, eps=1e-3, num_iters=num_iters)
    torch.testing.assert_close(y, expected, **CLOSE)
    torch.testing.assert_close(tuple(found), (moments.mean, moments.covs[0], root), **CLOSE)
    assert not any(value.requires_grad for value in found)
    leaves = [x, weight, *([] if bias is None else [bias])]
    along = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours, theirs = (torch.autograd.grad(out, leaves, along) for out in (y, expected))
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("needed", [(True, False), (False, True), (True, True)])
def test_second_gradients_and_leaves_without_any(needed: tuple[bool, bool]) -> None:
    x, weight = correlated(12, 4), correlated(3, 4, seed=1)
    leaves = [leaf.detach().requires_grad_(wanted) for leaf, wanted in zip((x, weight), needed, strict=True)]

    def step(*leaves: Tensor) -> Tensor:
        return whitened_linear(*leaves, None, eps=1e-3, num_iters=3)[0]

    assert torch.autograd.gradcheck(step, leaves)
    assert torch.autograd.gradgradcheck(step, leaves)


def both(layer: WhitenedLinear, monkeypatch: pytest.MonkeyPatch, steps: int, rows: int) -> tuple[Any, Any]:
    """The same training with the node and without, from float64 on."""
    layers = layer.double(), copy.deepcopy(layer).double()
    optimizers = [torch.optim.SGD(each.parameters(), 0.01) for each in layers]
    for step in range(steps):
        x = correlated(rows, layer.in_features, seed=step)
        grads = []
        for place, (each, optimizer) in enumerate(zip(layers, optimizers, strict=True)):
            with monkeypatch.context() as patch:
                if place:
                    patch.setattr(Whitening, "takes_own_root", lambda self, x: False)
                mine = x.detach().clone().requires_grad_()
                optimizer.zero_grad()
                each(mine).square().mean().backward()
                optimizer.step()
                grads.append(mine.grad)
        torch.testing.assert_close(*grads, **CLOSE)
    return layers


@pytest.mark.parametrize(
    "config",
    [
        None,
        WhiteningConfig(num_iters=5, eps=0.1),
        WhiteningConfig(momentum=None),
        WhiteningConfig(num_iters=2),
        WhiteningConfig(block_size=2),
    ],
    ids=str,
)
def test_a_layer_trains_and_remembers_the_same(
    config: WhiteningConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    calls: list[int] = []
    node = whitened_linear
    monkeypatch.setattr("netdeconv.nn.whitening.whitened_linear", lambda *a, **k: calls.append(1) or node(*a, **k))
    ours, theirs = both(WhitenedLinear(6, 3, whitening=config), monkeypatch, steps=5, rows=20)
    assert len(calls) == 5
    for (name, value), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, **CLOSE, msg=name)
    assert ours.whitening.clock.steps == 5
    x = correlated(4, 6)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), **CLOSE)


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        (WhiteningConfig(block_size=4), 20),
        (WhiteningConfig(block_size=2, grouping="interleaved"), 20),
        (WhiteningConfig(num_iters=6), 20),
        (WhiteningConfig(solver="eigh"), 20),
        (WhiteningConfig(update_every=16), 20),
        (WhiteningConfig(differentiable=False), 20),
        (WhiteningConfig(scale=True), 20),
        (WhiteningConfig(max_samples=10), 20),
        (WhiteningConfig.paper(), 20),
        (None, 1),
        (WhiteningConfig(block_size=48), 5),
    ],
    ids=str,
)
def test_what_it_cannot_compute_goes_the_other_way(
    config: WhiteningConfig | None, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr("netdeconv.nn.whitening.whitened_linear", never)
    features = 48 if rows == 5 else 6
    layer = WhitenedLinear(features, 3, whitening=config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteWarning)
        layer(torch.randn(rows, features)).sum().backward()


@pytest.mark.parametrize("block", [6, 3])
@pytest.mark.parametrize("good", [True, False])
def test_who_cannot_look_gets_other_statistics_where_the_rows_have_none(good: bool, block: int) -> None:
    x, weight = correlated(30, 6), correlated(4, 6, seed=1)
    if not good:
        x = torch.full_like(x, 3.0).requires_grad_()
    root = torch.eye(block, dtype=torch.float64) * 2
    others = (torch.arange(6.0, dtype=torch.float64), root)
    y, mean, _, used, counts = whitened_linear(x, weight, None, eps=1e-3, num_iters=3, block=block, otherwise=others)
    assert counts is not None
    assert bool(counts) == good
    if good:
        expected, *_ = whitened_linear(x, weight, None, eps=1e-3, num_iters=3, block=block)
    else:
        expected = (x - others[0]) * 2 @ weight.T
        torch.testing.assert_close((mean, used), others)
    torch.testing.assert_close(y, expected, **CLOSE)
    along = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for graph in (False, True):
        ours, theirs = (torch.autograd.grad(out, [x, weight], along, create_graph=graph, retain_graph=True)
                        for out in (y, expected))  # fmt: skip
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3.0])
def test_rows_without_statistics_are_no_step(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers = both(WhitenedLinear(6, 3), monkeypatch, steps=2, rows=20)
    x = torch.full((20, 6), value, dtype=torch.float64)
    outputs = []
    for place, layer in enumerate(layers):
        with monkeypatch.context() as patch:
            if place:
                patch.setattr(Whitening, "takes_own_root", lambda self, x: False)
            with pytest.warns(NonFiniteWarning, match="in 1 step"):
                outputs.append(layer(x))
    torch.testing.assert_close(*outputs, equal_nan=True, **CLOSE)
    for (name, one), other in zip(layers[0].state_dict().items(), layers[1].state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, **CLOSE, msg=name)
    assert int(layers[0].whitening.num_skipped) == 1


@pytest.mark.parametrize("size", [1e10, 1e-12])
def test_numbers_whose_squares_leave_the_range_go_the_other_way(size: float) -> None:
    torch.manual_seed(0)
    layer = WhitenedLinear(5, 3, whitening=WhiteningConfig(eps=0))
    y = layer(torch.randn(40, 5) * size)
    assert 0.1 < float(y.detach().std()) < 10  # white, whatever the input's size
    assert int(layer.whitening.num_updates) == 1


def test_who_hooks_the_whitening_sees_its_calls() -> None:
    layer, seen = WhitenedLinear(5, 3), []
    handle = layer.whitening.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    layer(torch.randn(8, 5))
    handle.remove()
    layer(torch.randn(8, 5))
    assert seen == [8]
