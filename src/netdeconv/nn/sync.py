"""Joining the moments of several processes into those of the whole batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from netdeconv.functional import Blocks, Moments

__all__ = ["distributed", "joined_moments"]


def distributed(process_group: Any = None) -> bool:
    """Whether there is more than one process to join."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(process_group) > 1


def joined_moments(moments: Moments, blocks: Blocks, about: Tensor, process_group: Any = None) -> Moments:
    """Moments of the rows of all processes together, by one all-reduce of count-weighted sums.

    Sums are taken about ``about``, the remembered mean, which is the same everywhere: taken about zero, a mean
    that is large beside the deviation would cost the covariance its digits. Without covariances only the mean is
    joined. Outside distributed training, and
    with one process, ``moments`` come back unchanged. Differentiable.

    Shapes: as :class:`netdeconv.functional.Moments`.
    """
    if not distributed(process_group):
        return moments
    with torch.autocast(moments.mean.device.type, enabled=False):
        return _joined(moments, blocks, about, process_group)


def _joined(moments: Moments, blocks: Blocks, about: Tensor, process_group: Any) -> Moments:
    if moments.rows == 0:  # an empty share still takes part, in the backward pass too, or the others would wait for it
        moments = Moments(moments.mean.nan_to_num(), tuple(cov.nan_to_num() for cov in moments.covs), 0, moments.total)
    count = moments.total.reshape(1)
    about = about.to(moments.mean.dtype)
    away = moments.mean - about
    outer = blocks.outer(away)
    sums = [
        count,
        away * count,
        *((cov + square).flatten() * count for cov, square in zip(moments.covs, outer, strict=False)),
    ]
    joined = _all_reduce(torch.cat(sums), process_group)
    total, sizes = joined[0], [away.numel(), *(cov.numel() for cov in moments.covs)]
    away, *squares = (joined[1:] / total).split(sizes)
    covs = tuple(
        square.reshape(cov.shape) - mine
        for square, cov, mine in zip(squares, moments.covs, blocks.outer(away), strict=False)
    )
    return Moments(away + about, covs, moments.rows, total)


class _AllReduce(Function):
    """The sum over processes. Its gradient is the sum of theirs, as each of them used the result."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, process_group: Any) -> Tensor:
        ctx.process_group = process_group
        total = value.clone()
        dist.all_reduce(total, group=process_group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.process_group), None


def _all_reduce(value: Tensor, process_group: Any) -> Tensor:
    total: Tensor = _AllReduce.apply(value, process_group)
    return total
