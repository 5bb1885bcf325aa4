"""The variance of every channel, with the gradient through it that keeps activations from growing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from netdeconv.functional.onlookers import watched
from netdeconv.functional.precision import without_autocast

__all__ = ["channel_variance"]


def channel_variance(x: Tensor, *, max_rows: int | None = None) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of every channel over images and positions, and the number of these.

    With ``max_rows`` of some images only, evenly taken out of the batch: as many as have so many positions together.
    The gradient then goes into these images alone, which is the gradient of the variance that was computed, at a
    fraction of the memory traffic.

    Shapes: x ``(N, C, *spatial)`` -> ``(C,)``, ``(C,)``, in float32 at least, also under autocast. The mean has no
    gradient.
    """
    positions = x[0, 0].numel() if x.numel() else 1
    every = 1 if max_rows is None else max(1, len(x) * positions // max_rows)
    x = x.unsqueeze(-1) if x.dim() == 2 else x
    with without_autocast(x.device.type):
        mean, var = _plain(x, every) if watched() else _Variance.apply(x, every)
    return mean.detach(), var, -(-len(x) // every) * positions


def _plain(x: Tensor, every: int) -> tuple[Tensor, Tensor]:
    some = _some(x, every)
    dims = _dims(x)
    mean = some.mean(dims)
    away = some - _along(mean.detach(), x)  # the mean's gradient would be that of a sum of differences: zero
    return mean, away.square().mean(dims)


class _Variance(Function):
    """:func:`_plain`, whose gradient is written in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, every: int) -> tuple[Tensor, Tensor]:
        mean, var = _plain(x, every)
        ctx.save_for_backward(x, mean)
        ctx.every = every
        ctx.mark_non_differentiable(mean)
        return mean, var

    @staticmethod
    def backward(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Tensor, None]:
        x, mean = ctx.saved_tensors
        some = _some(x, ctx.every)
        count = some.numel() // max(1, some.shape[1])
        own = ((some - _along(mean, x)) * _along(grad * (2 / max(1, count)), x)).to(x.dtype)
        if ctx.every == 1:
            return own, None
        full = torch.zeros_like(x)
        full[:: ctx.every] = own
        return full, None


def _some(x: Tensor, every: int) -> Tensor:
    return x[::every].to(torch.promote_types(x.dtype, torch.float32))


def _dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _along(value: Tensor, x: Tensor) -> Tensor:
    """``(C,)`` beside ``(N, C, *spatial)``."""
    return value.reshape(-1, *[1] * (x.dim() - 2))
