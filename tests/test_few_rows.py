"""Batches with too few rows for a covariance, or rows that are all the same: the plain layer, or no step."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layer_kinds import KINDS, Kind, every_kind
from netdeconv import (
    ChannelWhitening,
    NonFiniteWarning,
    StatisticsWarning,
    WhitenedConv1d,
    WhitenedConv2d,
    WhitenedConv3d,
    WhitenedLinear,
    WhiteningConfig,
    freeze,
    unfreeze,
)
from netdeconv import reference as ref

# float64, a few hundred operations, five iterations that amplify rounding by up to 1.5**5 squared.
TIGHT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
# The same float32 operations in another order.
SAME: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, **TIGHT)


def activation(*shape: int, seed: int = 0) -> Tensor:
    """Correlated across channels, with another mean in every one."""
    noise = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    noise = noise + 0.5 * noise.roll(1, 1)
    return noise + torch.arange(shape[1]).reshape(-1, *[1] * (len(shape) - 2))


# ---- one row for every image ---------------------------------------------------------------------------

FEW_ROWS: dict[str, tuple[Any, dict[str, Any], tuple[int, ...]]] = {
    "conv1d": (WhitenedConv1d, {}, (1,)),
    "conv2d": (WhitenedConv2d, {}, (1, 1)),
    "strided": (WhitenedConv2d, {"stride": 2}, (1, 1)),
    "padded": (WhitenedConv2d, {"padding": 1}, (1, 1)),
    "grouped": (WhitenedConv2d, {"groups": 2}, (1, 1)),
    "depthwise": (WhitenedConv2d, {"groups": 4, "bias": False}, (1, 1)),
    "conv3d": (WhitenedConv3d, {"bias": False}, (1, 1, 1)),
}


@pytest.mark.parametrize("name", FEW_ROWS)
@pytest.mark.parametrize("batch", [1, 2, 9])
def test_a_1x1_convolution_of_single_pixels_is_the_plain_one_exactly(name: str, batch: int) -> None:
    make, options, size = FEW_ROWS[name]
    layer = make(4, 8, 1, **options)
    plain = getattr(nn, make.__name__.removeprefix("Whitened"))(4, 8, 1, **options)
    plain.load_state_dict({key: value for key, value in layer.state_dict().items() if "whitening" not in key})
    before = {key: value.clone() for key, value in layer.whitening.state_dict().items()}
    for step in range(18):
        x = activation(batch, 4, *size, seed=step).float()
        mine, known = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = layer(mine), plain(known)
        assert torch.equal(y, expected)
        ours, theirs = (
            torch.autograd.grad(out.square().sum(), [leaf, *module.parameters()])
            for out, leaf, module in ((y, mine, layer), (expected, known, plain))
        )
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert torch.equal(layer.eval()(x), expected)
        assert torch.equal(freeze(layer.train())(x), expected)
        unfreeze(layer)
    for key, value in layer.whitening.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", FEW_ROWS)
def test_the_published_layer_whitens_single_pixels(name: str) -> None:
    make, options, size = FEW_ROWS[name]
    layer = make(4, 8, 1, **options, dtype=torch.float64, whitening=WhiteningConfig.paper(sampling_stride=1))
    window = {key: value for key, value in options.items() if key != "bias"}
    published = ref.PublishedConv(
        layer.weight, layer.bias, block_size=64, eps=1e-5, num_iters=5, momentum=0.1, sampling_stride=1, **window
    )
    for step in range(3):
        x = activation(9, 4, *size, seed=step)
        y = layer(x)
        close(y, published(x, training=True))
        assert (y - layer._conv_forward(x, layer.weight, layer.bias)).abs().max() > 0.1
    close(layer.whitening.running_root, published.running_deconv)
    close(layer.eval()(x), published(x, training=False))


@pytest.mark.parametrize("average", ["covariance", "root"])
def test_single_pixels_leave_no_trace_in_what_larger_maps_say(average: str) -> None:
    config = WhiteningConfig(average=average, differentiable=False, eps=0.1)
    layers = [WhitenedConv2d(4, 3, 1, whitening=config) for _ in range(2)]
    for step in range(3):
        layers[0](activation(9, 4, 1, 1, seed=step).float())
    for step in range(19):
        for layer in layers:
            layer(activation(9, 4, 3, 3, seed=step).float())
        layers[0](activation(9, 4, 1, 1, seed=step).float())  # nor in between
    for key, value in layers[1].whitening.state_dict().items():
        assert torch.equal(layers[0].whitening.get_buffer(key), value), key


def test_what_has_more_than_a_row_per_image_is_whitened() -> None:
    """A larger map, a larger kernel, and layers that see rows and nothing else."""
    for layer, size in (
        (WhitenedConv2d(4, 4, 1, bias=False), (4, 1, 2)),
        (WhitenedConv2d(4, 4, 3, padding=1, bias=False), (4, 1, 1)),
        (WhitenedLinear(4, 4, bias=False), (4,)),
        (ChannelWhitening(4), (4,)),
        (ChannelWhitening(4), (4, 1, 1)),
    ):
        x = activation(9, *size).float()
        y = layer(x)
        torch.testing.assert_close(y.mean((0, *range(2, y.dim()))), torch.zeros(4), rtol=0, atol=1e-5)
        assert int(layer.whitening.num_steps) == 1


# ---- the same row throughout --------------------------------------------------------------------------

WITHOUT = r"expected finite input that varies, got NaN, infinite or constant values, or a single row, in 1 step"
CONFIGS = {
    "default": WhiteningConfig(),
    "no scale": WhiteningConfig(scale=False),
    "averaged roots": WhiteningConfig(average="root", differentiable=False, update_every=4),
    "through the root": WhiteningConfig(differentiable=True),
    "exact root": WhiteningConfig(solver="eigh"),
}
# One image that has room for one position of the kernel; of a 1x1 kernel that is the plain layer, and what is reflected
# has two positions at least.
SINGLE = {
    "conv1d": (4, 1), "conv2d": (4, 1, 1), "grouped": (4, 2, 3), "conv3d": (3, 1, 1, 1), "linear": (1, 5),
    "channel": (5, 1, 1),
}  # fmt: skip


def same_rows(kind: Kind) -> Tensor:
    """Every channel, or feature, has one value throughout."""
    size = kind.size if kind.name != "linear" else (kind.size[-1],)
    value = torch.randn(size[0], generator=torch.Generator().manual_seed(7)) + 0.1
    x = value.reshape(-1, *[1] * (len(size) - 1)).expand(6, *size)
    return x.unsqueeze(1).expand(-1, 3, -1) if kind.name == "linear" else x


def assert_no_step(layer: Any, x: Tensor) -> None:
    """It is whitened as in evaluation, by constants, and changes nothing but the count of what was skipped.

    An ordinary step takes the root of the last refresh, though, whatever evaluation does.
    """
    evaluated = copy.deepcopy(layer).eval()
    if not layer.whitening.clock.due:
        for last in [name for name, _ in layer.whitening.named_buffers() if name.startswith("last_root")]:
            running = evaluated.whitening.get_buffer(last.replace("last", "running"))
            running.copy_(layer.whitening.get_buffer(last))
    before = {name: value.clone() for name, value in layer.whitening.state_dict().items()}
    mine, known = x.clone().requires_grad_(), x.clone().requires_grad_()
    with pytest.warns(NonFiniteWarning, match=WITHOUT):
        y = layer(mine)
    for name, value in layer.whitening.state_dict().items():
        assert torch.equal(value, before[name] + (name in ("num_steps", "num_skipped"))), name
    expected = evaluated(known)
    torch.testing.assert_close(y, expected, **SAME)
    along = torch.randn(y.shape, generator=torch.Generator().manual_seed(8))
    ours, theirs = (torch.autograd.grad(out, leaf, along)[0] for out, leaf in ((y, mine), (expected, known)))
    torch.testing.assert_close(ours, theirs, **SAME)


@pytest.mark.parametrize("kind", [param for param in KINDS if param.id in SINGLE])
@pytest.mark.parametrize("steps", [2, 17], ids=["refresh", "ordinary"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_single_row_is_no_step(kind: Kind, name: str, steps: int) -> None:
    assert_no_step(kind.trained(steps, CONFIGS[name]), torch.randn(1, *SINGLE[kind.name]))


@every_kind
@pytest.mark.parametrize("steps", [2, 17], ids=["refresh", "ordinary"])
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_that_are_all_the_same_are_no_step(kind: Kind, name: str, steps: int) -> None:
    layer, x = kind.trained(steps, CONFIGS[name]), same_rows(kind)
    scaled = layer.whitening.config.scale
    padded = any(map(any, layer.whitening.window.padding)) and layer.whitening.window.padding_mode == "zeros"
    if not scaled and (padded or not layer.whitening.clock.due):
        layer(x)  # padding makes rows that differ, and a mean alone may be that of a constant
        assert int(layer.whitening.num_skipped) == 0
    else:
        assert_no_step(layer, x)


@pytest.mark.parametrize("kind", [param for param in KINDS if param.id in SINGLE])
def test_a_first_single_row_is_no_step_either(kind: Kind) -> None:
    layer, x = kind.layer(), torch.randn(1, *SINGLE[kind.name])
    with pytest.warns(NonFiniteWarning, match=WITHOUT):
        layer(x)
    with pytest.warns(StatisticsWarning, match="got none so far"):
        layer.eval()(x)
    trained, fresh = layer.train(), kind.layer()
    y, expected = trained(kind.input()), fresh(kind.input())
    torch.testing.assert_close(y, expected, **SAME)
    torch.testing.assert_close(trained.eval()(kind.input()), fresh.eval()(kind.input()), **SAME)


@pytest.mark.parametrize("kind", [param for param in KINDS if param.id in ("conv1d", "conv2d", "linear")])
def test_the_published_procedure_whitens_constants(kind: Kind) -> None:
    layer = kind.layer(WhiteningConfig.paper())
    for x in (same_rows(kind), torch.randn(1, *SINGLE[kind.name])):
        assert bool(layer(x).isfinite().all())
    assert int(layer.whitening.num_updates) == 2


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-4, 3.7, 100.3, 1e-30, 1e10])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("padding", [0, 1])
def test_a_constant_map_is_no_step_however_the_sums_are_rounded(value: float, scale: bool, padding: int) -> None:
    """Padded, it is none for what is scaled by the channels' deviation; its patches do vary."""
    layer = WhitenedConv2d(3, 4, 3, padding=padding, whitening=WhiteningConfig(scale=scale))
    layer(activation(6, 3, 7, 7).float())
    before = {name: value.clone() for name, value in layer.whitening.state_dict().items()}
    x = torch.full((6, 3, 7, 7), value).requires_grad_()
    varies = padding == 1 and not scale and value > 1e-19
    with contextlib.nullcontext() if varies else pytest.warns(NonFiniteWarning, match="in 1 step"):
        y = layer(x)
    assert bool(y.isfinite().all())
    y.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    for name in before.keys() - {"num_steps", "num_skipped"}:
        assert torch.equal(layer.whitening.get_buffer(name), before[name]) != varies, name
    assert int(layer.whitening.num_skipped) == (not varies)
