"""Errors of the layers: each says what was expected, what came, where, and what to do."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from netdeconv import (
    ChannelWhitening,
    ShapeError,
    StatisticsWarning,
    WhitenedConv1d,
    WhitenedConv2d,
    WhitenedConv3d,
    WhitenedLinear,
)


@pytest.mark.parametrize(
    ("layer", "size", "where", "expected"),
    [
        (WhitenedConv1d(4, 6, 3), (2, 5, 9), r"WhitenedConv1d\(4, 6, kernel_size=3\)", r"\(N, 4, L\) or \(4, L\)"),
        (WhitenedConv2d(4, 6, 3), (2, 5, 9, 9), r"WhitenedConv2d\(4, 6, kernel_size=3\)", r"\(N, 4, H, W\)"),
        (WhitenedConv2d(4, 6, 3), (5, 9, 9), r"WhitenedConv2d", r"\(N, 4, H, W\) or \(4, H, W\)"),
        (
            WhitenedConv3d(4, 6, (1, 2, 3)),
            (2, 5, 9, 9, 9),
            r"WhitenedConv3d\(4, 6, kernel_size=\(1, 2, 3\)\)",
            "D, H, W",
        ),
        (WhitenedLinear(4, 6), (2, 5), r"WhitenedLinear\(4, 6\)", r"\(\*, 4\)"),
        (ChannelWhitening(4), (2, 5, 9), r"ChannelWhitening\(4\)", r"\(N, 4\) up to \(N, 4, D, H, W\)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_a_wrong_number_of_channels(layer: nn.Module, size: tuple[int, ...], where: str, expected: str) -> None:
    got = str(size).replace("(", r"\(").replace(")", r"\)")
    match = rf"^{where}.*: expected x of shape .*{expected}.*, got {got} with 5 channels\. Pass 4 channels, or build"
    for mode in (True, False):
        with pytest.raises(ShapeError, match=match):
            layer.train(mode)(torch.zeros(size))


@pytest.mark.parametrize(
    ("layer", "size", "advice"),
    [
        (WhitenedConv1d(4, 6, 3), (4,), r"x\.unsqueeze\(0\)"),
        (WhitenedConv1d(4, 6, 3), (2, 4, 9, 9), r"use the layer for this number of dimensions"),
        (WhitenedConv2d(4, 6, 3), (4, 9), r"x\.unsqueeze\(0\)"),
        (WhitenedConv2d(4, 6, 3), (1, 2, 4, 9, 9), r"use the layer"),
        (WhitenedConv3d(4, 6, 3), (9, 9, 9), r"x\.unsqueeze\(0\)"),
        (ChannelWhitening(4), (4,), r"pass x\.unsqueeze\(0\)"),
        (ChannelWhitening(4), (1, 4, 1, 1, 1, 1), r"up to \(N, 4, D, H, W\)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_a_wrong_number_of_dimensions(layer: nn.Module, size: tuple[int, ...], advice: str) -> None:
    match = rf"^{type(layer).__name__}\(4.*expected x of shape .* with {len(size)} dimensions"
    with pytest.raises(ShapeError, match=match) as caught:
        layer(torch.zeros(size))
    assert caught.match(advice)


def test_a_scalar_is_no_row_of_features() -> None:
    with pytest.raises(ShapeError, match=r"^WhitenedLinear\(4, 6\): expected x of shape \(\*, 4\), got a scalar"):
        WhitenedLinear(4, 6)(torch.tensor(1.0))


@pytest.mark.parametrize("layer", [WhitenedConv2d(4, 6, 3), WhitenedLinear(4, 6), ChannelWhitening(4)])
@pytest.mark.parametrize("kind", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_input_that_is_not_floating_point(layer: nn.Module, kind: torch.dtype) -> None:
    match = (
        rf"^{type(layer).__name__}\(4.*expected floating point input, got {kind}\. Convert it first, e\.g\. x\.float"
    )
    with pytest.raises(TypeError, match=match):
        layer(torch.zeros(2, 4, 9, 9).to(kind))


@pytest.mark.parametrize(
    ("channels", "out", "groups", "which"), [(4, 6, 3, "in"), (6, 4, 3, "out"), (4, 4, 0, "in"), (4, 4, -1, "in")]
)
def test_groups_that_do_not_divide_the_channels(channels: int, out: int, groups: int, which: str) -> None:
    match = (
        rf"^WhitenedConv2d\({channels}, {out}, kernel_size=3\): expected groups >= 1 that divide {which}_channels=\d, "
        rf"got groups={groups}\. Use a divisor of both in_channels={channels} and out_channels={out}"
    )
    with pytest.raises(ShapeError, match=match):
        WhitenedConv2d(channels, out, 3, groups=groups)


@pytest.mark.parametrize(
    "make", [lambda: WhitenedConv2d(0, 4, 3), lambda: WhitenedLinear(0, 4), lambda: ChannelWhitening(0)]
)
def test_no_channels(make: Any) -> None:
    with pytest.raises(ShapeError, match=r"expected (in_channels|in_features|num_channels) >= 1, got 0"):
        make()


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (WhitenedConv1d(4, 6, 3), torch.zeros(2, 4, 9)),
        (WhitenedConv2d(4, 6, 3), torch.zeros(2, 4, 9, 9)),
        (WhitenedConv3d(4, 6, 3), torch.zeros(2, 4, 9, 9, 9)),
        (WhitenedLinear(4, 6), torch.zeros(2, 4)),
        (ChannelWhitening(4), torch.zeros(2, 4)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_evaluation_before_any_training_step(layer: nn.Module, x: Tensor) -> None:
    match = (
        r"^netdeconv: expected whitening statistics from training, got none so far: whitened layers act as the plain "
        r"ones\. Run some batches in training mode \(model\.train\(\)\), load a state dict, or run netdeconv\.calibrate"
    )
    with pytest.warns(StatisticsWarning, match=match):
        y = layer.eval()(x)
    plain = x
    if not isinstance(layer, ChannelWhitening):
        kind = getattr(nn, type(layer).__name__.removeprefix("Whitened"))
        plain = kind.forward(layer, x)
    torch.testing.assert_close(y, plain, rtol=1e-4, atol=1e-5)  # variance one and eps: a scale of 1 - 5e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)  # said once


def test_folding_before_any_training_step() -> None:
    layer = WhitenedConv2d(4, 6, 3)
    with pytest.warns(StatisticsWarning, match="got none so far"):
        weight, bias = layer.folded()
    torch.testing.assert_close((weight, bias), (layer.weight, layer.bias))


def test_a_map_that_the_window_does_not_fit_is_refused_and_not_counted() -> None:
    layer = WhitenedConv2d(4, 6, 3)
    for size in ((2, 4, 2, 9), (4, 1, 1), (2, 4, 0, 0)):
        got = str(size).replace("(", r"\(").replace(")", r"\)")
        match = (
            r"^WhitenedConv2d\(4, 6, kernel_size=3\): expected x of shape \(N, 4, H, W\) or \(4, H, W\) with a map of "
            rf"at least \(3, 3\), got {got}\. Pass a larger map, or raise the padding"
        )
        with pytest.raises(ShapeError, match=match):
            layer(torch.zeros(size))
    assert int(layer.whitening.num_steps) == 0
    with pytest.raises(ShapeError, match=r"a map of at least \(1, 5\), got"):
        WhitenedConv2d(4, 6, (1, 3), padding=(1, 0), dilation=2)(torch.zeros(2, 4, 3, 4))


def test_a_dtype_that_is_not_the_weights_is_refused_before_the_step_counts() -> None:
    layer = WhitenedConv2d(3, 4, 3)
    expected = r"expected input of dtype torch\.float32, that of the weight, got torch\.float64"
    with pytest.raises(TypeError, match=expected):
        layer(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert layer.whitening.num_steps == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.randn(2, 3, 8, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize(("mode", "size"), [("reflect", 2), ("circular", 1)])
def test_padding_that_needs_a_larger_map(mode: str, size: int) -> None:
    layer = WhitenedConv2d(3, 4, 5, padding=2, padding_mode=mode)
    with pytest.raises(ShapeError, match=r"a map larger than the padding .* Pass a larger map, or pad less"):
        layer(torch.randn(2, 3, size, size))
    assert layer.whitening.num_steps == 0
    layer(torch.randn(2, 3, size + 1, size + 1))
