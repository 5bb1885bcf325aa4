"""The variance of every channel and its gradient, by hand, against plain formulas, and in a step of one node."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import netdeconv.nn.estimator
from layer_kinds import BY_NAME, Kind, every_kind
from netdeconv import NonFiniteWarning, WhitenedConv2d, WhiteningConfig
from netdeconv.functional import (
    Blocks,
    Geometry,
    Window,
    channel_variance,
    fold,
    scale_and_slope,
    scale_of,
    whitened_convolution,
)

# float64, sums of at most a few hundred numbers of order one.
TIGHT: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-11}
# bfloat16 and float16 numbers are exact in float32: only its own rounding is left.
SINGLE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain(x: Tensor) -> Tensor:
    """Mean of squares less square of the mean, of every channel."""
    dims = [0, *range(2, x.dim())]
    return x.square().mean(dims) - x.mean(dims).square()


# ---- value ------------------------------------------------------------------------------------------


def test_variance_by_hand() -> None:
    # Channel 0: 1, 3, 5, 7, mean 4, variance 5. Channel 1: 2 throughout.
    x = torch.tensor([[[1.0, 3], [2, 2]], [[5, 7], [2, 2]]])
    mean, var, count = channel_variance(x)
    assert (mean.tolist(), var.tolist(), count) == ([4, 2], [5, 0], 4)


def test_variance_without_a_map_by_hand() -> None:
    mean, var, count = channel_variance(torch.tensor([[1.0, 2], [3, 2], [8, 2]]))
    assert (mean.tolist(), count) == ([4, 2], 3)
    torch.testing.assert_close(var, torch.tensor([26 / 3, 0]))


@pytest.mark.parametrize("size", [(), (5,), (3, 4), (2, 3, 2)])
def test_variance_is_the_plain_formula_and_torch_s(size: tuple[int, ...]) -> None:
    x = randn(6, 3, *size) + 2
    mean, var, count = channel_variance(x)
    torch.testing.assert_close(var, plain(x), **TIGHT)
    torch.testing.assert_close(var, x.transpose(0, 1).flatten(1).var(1, correction=0), **TIGHT)
    torch.testing.assert_close(mean, x.transpose(0, 1).flatten(1).mean(1), **TIGHT)
    assert count == 6 * math.prod(size)


@pytest.mark.parametrize(
    ("max_rows", "images"),
    [(None, range(7)), (42, range(7)), (41, range(7)), (21, range(0, 7, 2)), (14, range(0, 7, 3)), (1, range(1))],
)
def test_some_images_are_evenly_taken(max_rows: int | None, images: range) -> None:
    x = randn(7, 3, 2, 3)
    some = x[list(images)].clone()
    for ours, known in zip(channel_variance(x, max_rows=max_rows), channel_variance(some), strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(known))
    rows = x[:, :, 0, 0]  # one position for every image
    assert channel_variance(rows, max_rows=3)[2] == 4


def test_a_large_mean_does_not_cost_the_variance_its_digits() -> None:
    # Rounding of the numbers themselves is 1e4 * 6e-8 = 6e-4; of their squares it would be 1e8 * 6e-8 = 6.
    x = (randn(50, 4, 3, 3) + 1e4).float()
    torch.testing.assert_close(channel_variance(x)[1].double(), plain(x.double()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_up_in_float32(kind: torch.dtype) -> None:
    x = (randn(40, 3, 8, 8) * 30 + 100).to(kind).requires_grad_()  # the squares are beyond float16's range
    mean, var, _ = channel_variance(x)
    assert mean.dtype == var.dtype == torch.float32
    torch.testing.assert_close(var, plain(x.detach().double()).float(), **SINGLE)
    along = torch.tensor([1.0, -2, 3])
    (var * along).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == kind
    exact = x.detach().float().requires_grad_()
    (channel_variance(exact)[1] * along).sum().backward()
    assert exact.grad is not None
    assert torch.equal(x.grad, exact.grad.to(kind))


def test_autocast_does_not_reach_it() -> None:
    x = randn(6, 3, 4, 4).float().requires_grad_()
    results = []
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            mean, var, _ = channel_variance(x)
            results.append((mean, var, *torch.autograd.grad(var.sum(), x)))
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("max_rows", [None, 4])
def test_an_empty_batch_has_no_variance_and_a_gradient_of_no_entries(max_rows: int | None) -> None:
    for size in ((3,), (3, 4, 4)):
        x = torch.zeros(0, *size, requires_grad=True)
        mean, var, count = channel_variance(x, max_rows=max_rows)
        assert count == 0
        assert bool(mean.isnan().all() and var.isnan().all())
        var.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape


def test_scale_by_hand() -> None:
    var = torch.tensor([4.0, 0.25, 1e-8, 0.0], requires_grad=True)
    least = 0.01 * 4.25 / 4  # a hundredth of the mean, but for 1e-8
    scale = scale_of(var, 1e-4)
    torch.testing.assert_close(scale, torch.tensor([0.5, 2, least**-0.5, least**-0.5]))
    (grad,) = torch.autograd.grad(scale.sum(), var)
    common = 2 * 0.01 / 4 * (-0.5 * least**-1.5)  # two channels are divided by it, and it is of all four
    torch.testing.assert_close(grad, torch.tensor([-0.5 / 8, -0.5 / 0.125, 0, 0]) + common)
    scale = scale_of(var, 0.5)
    torch.testing.assert_close(scale, torch.tensor([0.5, 2**0.5, 2**0.5, 2**0.5]))
    (grad,) = torch.autograd.grad(scale.sum(), var)
    torch.testing.assert_close(grad, torch.tensor([-0.5 / 8, 0, 0, 0]))
    assert bool(scale_of(torch.zeros(2), 0.0).isfinite().all())


# ---- gradient ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(), (5,), (2, 3)])
@pytest.mark.parametrize("max_rows", [None, 6])
def test_the_gradient_is_that_of_the_plain_formula_any_number_of_times(
    size: tuple[int, ...], max_rows: int | None
) -> None:
    x = (randn(5, 3, *size) + 1).requires_grad_()
    every = 1 if max_rows is None else max(1, 5 * math.prod(size) // max_rows)
    along = randn(3, seed=1)
    found = []
    for var in (channel_variance(x, max_rows=max_rows)[1], plain(x[::every])):
        (grad,) = torch.autograd.grad((var.sqrt() * along).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), x)
        found.append((grad, second))
    for ours, known in zip(*found, strict=True):
        torch.testing.assert_close(ours, known, **TIGHT)
    if every > 1:
        assert not found[0][0][1::every].any()


@pytest.mark.parametrize("max_rows", [None, 6])
def test_the_gradients_are_those_of_finite_differences(max_rows: int | None) -> None:
    x = (randn(5, 3, 2, 2) + 1).requires_grad_()

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(value for value in channel_variance(x, max_rows=max_rows)[:2] if value.requires_grad)

    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # torch.jit
def test_forward_mode_and_nested_gradients_agree_with_backward_mode() -> None:
    x = randn(4, 2, 3)

    def energy(x: Tensor) -> Tensor:
        return channel_variance(x)[1].sqrt().sum()

    known = torch.autograd.functional.hessian(lambda x: plain(x).sqrt().sum(), x)
    torch.testing.assert_close(torch.func.hessian(energy)(x), known, **TIGHT)
    torch.testing.assert_close(torch.func.jacfwd(energy)(x), torch.func.jacrev(energy)(x), **TIGHT)


# ---- a training step of one node ------------------------------------------------------------------------

EPS = 1e-3


def step_of(
    channels: int = 4,
    groups: int = 1,
    max_rows: int | None = None,
    loudness: float = 1.0,
    stride: tuple[int, ...] = (1, 2),
    padding: tuple[int, ...] = (1, 0),
) -> tuple[Any, Any, tuple[Tensor, Tensor, Tensor]]:
    """A step as one node, the same operator by operator, and x, weight and bias."""
    window = Window((2, 3), stride, (1, 1), tuple((pad, pad) for pad in padding))
    blocks = Blocks.plan(channels, window, groups, 2, "contiguous")
    mean = randn(*blocks.mean_shape, seed=5)
    roots = [(root + root.mT) / 2 for root in (randn(*shape, seed=6) for shape in blocks.root_shapes)]
    geometry = Geometry(stride, padding, (1, 1), groups)
    x, weight, bias = randn(5, channels, 4, 5), randn(2 * groups, channels // groups, 2, 3, seed=1), randn(2 * groups)
    x[:, 1] *= 1e-3  # a channel that is divided by the least deviation, which is of the mean, or of eps: a constant
    x *= loudness

    def one_node(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        channel_mean, var, count = channel_variance(x.detach(), max_rows=max_rows)
        found = scale_and_slope(var, channel_mean, count, max_rows=max_rows, eps=EPS)
        return whitened_convolution(x, weight, bias, mean, roots, *found, blocks, geometry)

    def by_operators(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        some = x if max_rows is None else x[:: max(1, len(x) * 20 // max_rows)]
        folded, shifted = fold(weight, bias, mean, roots, blocks, scale_of(plain(some), EPS))
        return torch.conv2d(x, folded, shifted, stride, padding, 1, groups)

    return one_node, by_operators, (x, weight, bias)


@pytest.mark.parametrize("wanted", ["x weight bias", "x weight", "weight bias", "weight", "x"])
@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (3, 1), (4, 2), (3, 3)])
@pytest.mark.parametrize("max_rows", [None, 40])
def test_one_node_is_all_the_operators_with_both_gradients(
    wanted: str, channels: int, groups: int, max_rows: int | None
) -> None:
    one_node, by_operators, given = step_of(channels, groups, max_rows)
    names = wanted.split()
    for value, name in zip(given, ("x", "weight", "bias"), strict=True):
        value.requires_grad_(name in names)
    leaves = [value for value in given if value.requires_grad]
    found = []
    for run in (one_node, by_operators):
        y = run(*given)
        grads = torch.autograd.grad(y, leaves, randn(*y.shape, seed=3), retain_graph=True)
        with_graph = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        square = torch.stack([grad.square().sum() for grad in with_graph]).sum()
        found.append((y, *grads, *with_graph, *torch.autograd.grad(square, leaves, materialize_grads=True)))
    for ours, known in zip(*found, strict=True):
        torch.testing.assert_close(ours, known, rtol=1e-9, atol=1e-7)  # fourth powers of numbers of order ten


@pytest.mark.parametrize("loudness", [1.0, 0.1])
def test_one_node_without_a_bias(loudness: float) -> None:
    one_node, by_operators, (x, weight, _) = step_of(loudness=loudness)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    ours, known = (torch.autograd.grad(run(*leaves, None).square().sum(), leaves) for run in (one_node, by_operators))
    torch.testing.assert_close(ours, known, **TIGHT)


@pytest.mark.parametrize("max_rows", [None, 40])
def test_one_node_passes_gradcheck(max_rows: int | None) -> None:
    one_node, _, given = step_of(max_rows=max_rows)
    inputs = tuple(value.requires_grad_() for value in given)
    assert torch.autograd.gradcheck(one_node, inputs)
    assert torch.autograd.gradgradcheck(one_node, inputs, fast_mode=True)


# ---- layers -----------------------------------------------------------------------------------------


def test_a_layer_scales_by_some_images_of_a_large_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netdeconv.nn.estimator, "_ROWS_FOR_VARIANCE", 60)
    monkeypatch.setattr(netdeconv.nn.estimator, "_IMAGES_FOR_VARIANCE", 2)
    layer = WhitenedConv2d(4, 3, 3, padding=1, dtype=torch.float64)
    x = BY_NAME["conv2d"].input(8, dtype=torch.float64).requires_grad_()  # maps of 30 positions: every fourth image
    weight, bias = layer.weight, layer.bias
    y = layer(x)
    torch.testing.assert_close(layer.whitening.running_var, plain(x[::4].detach()), **TIGHT)
    whitening = layer.whitening
    scale = scale_of(plain(x[::4]), 1e-5)
    folded = fold(weight, bias, whitening.running_mean, [whitening.running_root], whitening.blocks, scale)
    expected = torch.conv2d(x, *folded, padding=1)
    torch.testing.assert_close(y, expected, **TIGHT)
    along = randn(*y.shape, seed=3)
    for ours, known in zip(
        torch.autograd.grad(y, [x, weight, bias], along),
        torch.autograd.grad(expected, [x, weight, bias], along),
        strict=True,
    ):
        torch.testing.assert_close(ours, known, **TIGHT)


@every_kind
@pytest.mark.parametrize("factor", [1e-2, 10.0, 1e3])
def test_input_of_another_size_gives_the_same_output(kind: Kind, factor: float) -> None:
    """As it does behind batch normalisation; so does the gradient, which becomes smaller as the input grows."""
    config = WhiteningConfig(eps=0.0, update_every=4, scale=True, differentiable=False)
    layers = [kind.layer(config, dtype=torch.float64) for _ in range(2)]
    for step in range(19):
        mine, other = kind.input(seed=step, dtype=torch.float64), kind.input(seed=step, dtype=torch.float64) * factor
        ys = [layer(x.requires_grad_()) for layer, x in zip(layers, (mine, other), strict=True)]
        torch.testing.assert_close(ys[1], ys[0], rtol=1e-9, atol=1e-9)
        along = torch.ones_like(ys[0]) + ys[0].detach()
        grads = [torch.autograd.grad(y, x, along)[0] for y, x in zip(ys, (mine, other), strict=True)]
        torch.testing.assert_close(grads[1] * factor, grads[0], rtol=1e-9, atol=1e-9)


def test_the_gradient_is_square_to_the_input_but_for_its_mean() -> None:
    """The output stays as it is if x grows about its mean, so that a step along the gradient cannot shrink it."""
    layer = WhitenedConv2d(4, 3, 1, dtype=torch.float64, whitening=WhiteningConfig(eps=0.0))
    x = randn(6, 4, 5, 5).requires_grad_()
    y = layer(x)
    (grad,) = torch.autograd.grad(y, x, randn(*y.shape, seed=1))
    centred = x - x.mean((0, 2, 3), keepdim=True)
    assert grad.abs().max() > 1e-2
    torch.testing.assert_close((grad * centred).sum((0, 2, 3)), torch.zeros(4, dtype=torch.float64), **TIGHT)


@pytest.mark.parametrize("size", [(1, 4, 3, 3), (5, 4, 3, 3)])
def test_a_batch_that_does_not_count_is_scaled_by_a_constant(size: tuple[int, ...]) -> None:
    """One position of a 3x3 kernel and one image is a single row, though its map varies; so is a constant batch."""
    layer = WhitenedConv2d(4, 3, 3, dtype=torch.float64)
    layer(randn(6, 4, 5, 5))
    x = randn(*size) if size[0] == 1 else torch.full(size, 3.0, dtype=torch.float64)
    x.requires_grad_()
    folded = [value.detach() for value in layer.folded()]
    with pytest.warns(NonFiniteWarning, match=r"constant values, or a single row, in 1 step"):
        y = layer(x)
    expected = torch.conv2d(x, *folded)
    torch.testing.assert_close(y, expected, **TIGHT)
    along = randn(*y.shape, seed=1)
    torch.testing.assert_close(torch.autograd.grad(y, x, along), torch.autograd.grad(expected, x, along), **TIGHT)


def test_a_step_that_is_not_one_node_is_the_same() -> None:
    """Such as one without a batch dimension, or with the padding as numbers before and behind."""
    torch.manual_seed(0)
    layer = WhitenedConv2d(4, 3, 3, padding=1, dtype=torch.float64)
    other = copy.deepcopy(layer)
    x = randn(1, 4, 5, 6)
    results = []
    for each, given in ((layer, x.clone().requires_grad_()), (other, x[0].clone().requires_grad_())):
        y = each(given)
        results.append((y, *torch.autograd.grad(y.square().sum(), [given, each.weight, each.bias])))
    assert results[0][0].grad_fn.name() != results[1][0].grad_fn.name()
    for ours, known in zip(*results, strict=True):
        torch.testing.assert_close(ours.reshape(known.shape), known, **TIGHT)
