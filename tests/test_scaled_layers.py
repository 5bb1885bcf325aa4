"""What dividing every channel by its deviation does to a layer: its scale no longer matters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from netdeconv import WhitenedConv2d, WhiteningConfig
from netdeconv.nn import Whitening
from one_feature import POINT, close

# What sees the same mean at every tap, all of the batch: a 1x1 kernel, and a window that goes round the map.
SCALED_LAYERS: dict[str, tuple[int, dict[str, Any]]] = {
    "1x1": (1, {}),
    "3x3": (3, {"padding": 1, "padding_mode": "circular"}),
    "grouped": (3, {"padding": 1, "padding_mode": "circular", "groups": 2}),
}


def scaled_layer(name: str, **changes: Any) -> WhitenedConv2d:
    torch.manual_seed(0)
    kernel, options = SCALED_LAYERS[name]
    config = WhiteningConfig(eps=0.01, **changes)
    return WhitenedConv2d(4, 6, kernel, **options, dtype=torch.float64, whitening=config)


def centred(seed: int) -> Tensor:
    """Maps whose channels have mean zero and other deviations, neighbours correlated."""
    x = torch.randn(5, 4, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = (x + x.roll(1, -1)) * torch.tensor([1.0, 2.0, 5.0, 10.0], dtype=torch.float64)[:, None, None]
    return x - x.mean((0, 2, 3), keepdim=True)


@pytest.mark.parametrize("steps", [0, 3, 17], ids=["first", "refresh", "ordinary"])
@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("name", SCALED_LAYERS)
def test_the_loss_does_not_change_with_the_scale_of_the_input(name: str, differentiable: bool, steps: int) -> None:
    layers = [scaled_layer(name, differentiable=differentiable, update_every=16) for _ in range(2)]
    for step in range(steps):
        for layer in layers:
            layer(centred(step) * (1 + step))
    assert layers[0].whitening.clock.due == (steps != 17)
    x = centred(99).requires_grad_()
    larger = x.detach() * torch.tensor([3.0, 7.0, 2.0, 1.0], dtype=torch.float64)[:, None, None]
    y, same = layers[0](x), layers[1](larger)
    torch.testing.assert_close(same, y, rtol=1e-9, atol=1e-9)
    loss = (y * torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).sum() ** 2
    (slope,) = torch.autograd.grad(loss, x)
    by_log_scale = (slope * x).sum((0, 2, 3))  # of every channel
    size = (slope.square().sum((0, 2, 3)) * x.square().sum((0, 2, 3))).sqrt()
    assert float(size.detach().min()) > 0.1
    torch.testing.assert_close(by_log_scale / size, torch.zeros_like(size), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SCALED_LAYERS)
def test_a_channel_that_is_nearly_dead_is_divided_by_a_tenth_of_the_others_deviation(name: str) -> None:
    layer = scaled_layer(name, update_every=16)
    x = centred(0)
    x[:, 2] *= 1e-4
    x.requires_grad_()
    scale = layer.whitening(x).scale
    var = x.detach().square().mean((0, 2, 3))
    close(scale[2], 10 * var.mean() ** -0.5, rtol=1e-9, atol=1e-9)
    close(scale[[0, 1, 3]], var[[0, 1, 3]] ** -0.5, rtol=1e-9, atol=1e-9)
    (slope,) = torch.autograd.grad(layer(x).square().sum(), x)
    length = float((slope.square().sum() * x.detach().square().sum()).sqrt())
    assert abs(float((slope * x.detach()).sum())) < 1e-9 * length  # all together, the input may be of any size


def test_below_eps_and_without_scale_the_loss_does_change() -> None:
    for change, factor in (({}, 1e-3), ({"scale": False}, 1.0)):
        layer = scaled_layer("1x1", **change)
        for step in range(17):
            layer(centred(step))
        x = (centred(99) * factor).requires_grad_()
        y = layer(x)
        (slope,) = torch.autograd.grad(y.square().sum(), x)
        expected = 2 * (y * (y - layer.bias[:, None, None])).sum()  # y - b is linear in x
        close((slope * x).sum(), expected.detach(), rtol=1e-9, atol=1e-9)


def test_eps_is_the_smallest_variance_that_a_channel_is_divided_by() -> None:
    whitening = Whitening(3, POINT, config=WhiteningConfig(eps=0.25), dtype=torch.float64)
    deviations = torch.tensor([4.0, 0.3, 0.0], dtype=torch.float64)
    x = torch.tensor([-1.0, 1.0])[:, None, None] * deviations[:, None]
    close(whitening(x.expand(2, 3, 2)).scale, [1 / 4, 2, 2])
    close(whitening.running_var, [16, 0.09, 0])


def test_variances_fit_half_precision() -> None:
    layer = WhitenedConv2d(3, 4, 3).half()
    for seed in range(3):
        x = 1000 * torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        layer(x.half())
    var = layer.whitening.running_var
    assert var is not None and bool(var.isfinite().all())
    assert bool(layer.eval()(x.half()).isfinite().all())


def test_the_gradient_of_the_scale_is_the_same_by_activations_and_by_weights() -> None:
    found = []
    for size in (5, 40):  # fewer numbers in the map than in the weights, and more
        layer = scaled_layer("grouped", update_every=16)
        x = torch.randn(1 if size == 5 else 4, 4, size, size, dtype=torch.float64, requires_grad=True)
        layer(x.detach())
        copy = scaled_layer("grouped", update_every=16)
        copy(x.detach())
        copy._geometry = lambda x, weight: None  # type: ignore[method-assign]
        assert (x.numel() < layer.weight.numel()) == (size == 5)
        (ours,), (known,) = (torch.autograd.grad(each(x).cos().sum(), x) for each in (layer, copy))
        close(ours, known, rtol=1e-9, atol=1e-9)
        found.append(ours.abs().max())
    assert min(found) > 0
