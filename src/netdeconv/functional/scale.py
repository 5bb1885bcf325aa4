"""The variance of every channel, with the gradient through it that keeps activations from growing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from netdeconv.functional.precision import as_dtype, at_least_float32, without_autocast
from netdeconv.functional.tracing import cached_constant, traced

__all__ = [
    "LEAST_SHARE",
    "along_channels",
    "channel_variance",
    "least_variance",
    "mean_over",
    "scale_of",
    "some_images",
    "tolerance",
    "varies",
    "what_varies",
]

_ROUNDING = 64  # in units of the last place: means of a million equal numbers were seen to be off by 11

# Of the channels' mean variance, what every channel is taken to have at least. One that is nearly dead shows now and
# then, and in other images than those that its variance is of: divided by its own deviation it makes training diverge.
LEAST_SHARE = 0.01


def channel_variance(x: Tensor, *, max_rows: int | None = None) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of every channel over images and positions, and the number of these.

    With ``max_rows`` of some images only, spaced evenly in the batch, with so many positions together; it takes a
    fraction of the memory traffic. The gradient then goes into these images alone.

    Shapes: x ``(N, C, *spatial)`` -> ``(C,)``, ``(C,)``, in float32 at least, also under autocast.
    """
    some, dims = some_images(x, max_rows), [0, *range(2, x.dim())]
    count = some.numel() // max(1, x.shape[1])
    with without_autocast(x.device.type):
        some = as_dtype(some, at_least_float32(x.dtype))
        mean = mean_over(some, dims)  # with gradient: second gradients need it, and variances joined over processes
        centred = some - along_channels(mean, x)
        recorded = traced() or (torch.is_grad_enabled() and x.requires_grad)
        return mean, mean_over(centred * centred if recorded else centred.mul_(centred), dims), count


def mean_over(x: Tensor, dims: list[int], dtype: torch.dtype | None = None) -> Tensor:
    """``x.mean(dims, dtype=dtype)``, in fewer operators."""
    dtype = x.dtype if dtype is None else dtype
    count = math.prod([x.shape[dim] for dim in dims])  # a list, as the compiler takes no generator
    if traced() or not count:
        return x.mean(dims, dtype=dtype)
    return x.sum(dims, dtype=dtype) * _one_over(count, dtype, x.device)  # a number of Python's takes two more


@cached_constant
def _one_over(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), 1 / count, dtype=dtype, device=device)


def varies(var: Tensor, square_of_mean: Tensor) -> Tensor:
    """Whether any of these variances is more than what rounding makes of a constant."""
    return (var.detach() > tolerance(var) * square_of_mean.detach()).any()


def what_varies(var: Tensor, mean: Tensor, eps: float) -> tuple[bool, bool]:
    """Whether all is finite and any channel :func:`varies`, and whether every one is above the least variance.

    Two looks in place of a dozen operators, where looking does not mean to wait for a device. The second may be false
    for one that is just above.
    """
    excess = torch.addcmul(var, mean, mean, value=-tolerance(var))
    lowest, highest = (float(value) for value in excess.aminmax())
    if not 0 < highest < math.inf:
        return False, False
    return True, lowest >= eps and (lowest >= LEAST_SHARE * highest or lowest >= LEAST_SHARE * float(var.mean()))


def tolerance(var: Tensor) -> float:
    """Of the square of the mean, what a variance must exceed not to be rounding."""
    return (_ROUNDING * torch.finfo(var.dtype).eps) ** 2


def scale_of(var: Tensor, eps: float) -> Tensor:
    """The scale of channels with these variances: one over the standard deviation, with a lower bound.

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
    distance = x.numel() // x.shape[1] // max_rows
    return x[::distance] if distance > 1 else x


def along_channels(value: Tensor, x: Tensor) -> Tensor:
    """A number of every channel, to be combined with x ``(N, C, *spatial)``."""
    return value.reshape(-1, *[1] * (x.dim() - 2))
