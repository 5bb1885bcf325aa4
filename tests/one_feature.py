"""A whitening of one feature, whose averages can be worked out by hand, for the tests of what it remembers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from netdeconv import WhiteningConfig
from netdeconv.functional import Window
from netdeconv.nn import Whitening

# float64, at most a hundred blends of numbers of order one.
TIGHT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
PLAIN = WhiteningConfig(eps=0.0, solver="newton_schulz")  # exact on a single number, a linear layer's otherwise
AVERAGED = PLAIN.replace(average="covariance")
SCALED = AVERAGED.replace(scale=True)
POINT = Window((1,), (1,), (1,), ((0, 0),))


def close(actual: Any, expected: Any, **tolerance: Any) -> None:
    actual, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (actual, expected))
    torch.testing.assert_close(actual, expected, **(tolerance or TIGHT))


def number(mean: float, deviation: float) -> Tensor:
    """A batch of one feature with this mean and deviation; with eps = 0 its root is 1 / deviation exactly."""
    return torch.tensor([[mean - deviation], [mean + deviation]], dtype=torch.float64)


def one_feature(config: WhiteningConfig) -> Whitening:
    return Whitening(1, Window(), config=config, dtype=torch.float64, label="here")


def batches(count: int) -> list[tuple[float, float]]:
    """Mean and deviation of every batch, all different."""
    return [(3.0 + (7 * step) % 11, 1.0 + (5 * step) % 13) for step in range(count)]


def remembered(whitening: Whitening) -> tuple[float, float]:
    return float(whitening.running_mean), float(whitening.running_root)


def used(whitening: Whitening, x: Tensor) -> tuple[float, float]:
    """Mean and root that this batch is whitened by."""
    found = whitening(x)
    (root,) = found.roots
    return float(found.mean), float(root)


def average(
    values: list[float], counts: list[float], momentum: float | None, debias: bool, start: float
) -> float:
    """Values that stand for so many steps each: the integral of ``(1 - momentum)**age`` over them, or of 1."""
    ages = [sum(counts[i + 1 :]) for i in range(len(counts))]
    weights = counts
    if momentum is not None:
        keep = 1 - momentum
        weights = [keep**age - keep ** (age + count) for age, count in zip(ages, counts, strict=True)]
    seen = sum(weight * value for weight, value in zip(weights, values, strict=True))
    return seen / sum(weights) if debias or momentum is None else seen + (1 - sum(weights)) * start


def average_root(deviations: list[float], counts: list[float], momentum: float | None, debias: bool) -> float:
    """The average variance's root, or the average root, as published."""
    if debias:
        return average([deviation**2 for deviation in deviations], counts, momentum, debias, 1) ** -0.5
    return average([1 / deviation for deviation in deviations], counts, momentum, debias, 1)
