"""The variance of every channel, with the gradient through it that keeps activations from growing."""

from __future__ import annotations

import torch
from torch import Tensor

from netdeconv.functional.precision import without_autocast

__all__ = ["LEAST_SHARE", "along_channels", "channel_variance", "least_variance", "scale_of", "some_images"]

# Of the channels' mean variance, what every channel is taken to have at least. One that is nearly dead shows now and
# then, and in other images than those that its variance is of: divided by its own deviation it makes training diverge.
LEAST_SHARE = 0.01


def channel_variance(x: Tensor, *, max_rows: int | None = None) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of every channel over images and positions, and the number of these.

    With ``max_rows`` of some images only, evenly taken out of the batch: as many as have so many positions together,
    at a fraction of the memory traffic. The gradient then goes into these images alone.

    Shapes: x ``(N, C, *spatial)`` -> ``(C,)``, ``(C,)``, in float32 at least, also under autocast.
    """
    some = some_images(x, max_rows)
    dims = [0, *range(2, x.dim())]
    with without_autocast(x.device.type):
        some = some.to(torch.promote_types(x.dtype, torch.float32))
        mean = some.mean(dims)  # with gradient: second gradients need it, and variances joined over processes
        var = (some - along_channels(mean, x)).square().mean(dims)
    return mean, var, some.numel() // max(1, x.shape[1])


def scale_of(var: Tensor, eps: float) -> Tensor:
    """What channels of these variances are multiplied by: one over their deviation, or over the least one.

    Shapes: ``(C,)`` -> ``(C,)``.
    """
    return var.maximum(least_variance(var, eps)).rsqrt()


def least_variance(var: Tensor, eps: float) -> Tensor:
    """The variance that a channel is taken to have at least: a hundredth of the channels' mean, and ``eps``."""
    return (LEAST_SHARE * var.mean()).clamp(min=max(eps, torch.finfo(var.dtype).tiny))


def some_images(x: Tensor, max_rows: int | None) -> Tensor:
    """Every k-th image of x, a view: k such that ``max_rows`` positions are left, or as few more as can be."""
    if max_rows is None or not x.numel():
        return x
    return x[:: max(1, x.numel() // x.shape[1] // max_rows)]


def along_channels(value: Tensor, x: Tensor) -> Tensor:
    """A number of every channel, to be combined with x ``(N, C, *spatial)``."""
    return value.reshape(-1, *[1] * (x.dim() - 2))
