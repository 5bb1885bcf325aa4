"""Joining the moments of several processes into those of the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from netdeconv.errors import StatisticsError
from netdeconv.functional import Blocks, Moments
from netdeconv.functional.precision import without_autocast

__all__ = ["check_same_mode", "distributed", "joined_moments", "joined_variance"]


def distributed(process_group: Any = None) -> bool:
    """Whether there is more than one process to join."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(process_group) > 1


def check_same_mode(mine: bool, first: Tensor, label: str) -> None:
    """Refuse to gather statistics in some processes only: they would wait for the others for ever.

    Args:
        mine: whether this process gathers.
        first: whether the first process does, as DistributedDataParallel brings it with the buffers before a step.
        label: what the error calls the layer.

    Raises:
        StatisticsError: they differ.
    """
    if bool(first) == mine:
        return
    gathered, kept = "gathered", "kept (frozen, or in evaluation mode)"
    here, there = (gathered, kept) if mine else (kept, gathered)
    raise StatisticsError(
        f"{label}: expected all processes in the same mode, but statistics are {here} in process {dist.get_rank()} and "
        f"{there} in the first one. Call freeze, unfreeze, model.train() and model.eval() in every process, or build "
        "the layer with WhiteningConfig(sync=False)."
    )


def joined_moments(
    several: Sequence[Moments], blocks: Blocks, about: Tensor, process_group: Any = None
) -> list[Moments]:
    """Moments of the rows of all processes together, by one all-reduce of count-weighted sums.

    Sums are taken about ``about``, the remembered mean, which is the same everywhere: taken about zero, a mean
    that is large beside the deviation would cost the covariance its digits. Without covariances only the mean is
    joined. Outside distributed training, and with one process, the moments come back unchanged. Differentiable.

    Args:
        several: moments of this process' rows, e.g. of all of them and of a sample; they travel together.
        blocks: how the rows are cut.
        about: of ``blocks.mean_shape``.
        process_group: processes to join; ``None`` for all.
    """
    if not distributed(process_group):
        return list(several)
    with without_autocast(about.device.type):
        # An empty share still takes part, in the backward pass too, or the others would wait for it.
        shares = [moments if moments.rows else _without_nan(moments) for moments in several]
        sums = [_sums(share, blocks, about) for share in shares]
        joined = _all_reduce(torch.cat(sums), process_group).split([len(part) for part in sums])
        return [_joined(part, share, blocks, about) for part, share in zip(joined, shares, strict=True)]


def joined_variance(mean: Tensor, var: Tensor, count: int, about: Tensor, process_group: Any = None) -> Tensor:
    """The variance of the entries of all processes together, from mean, variance and number of those of each.

    By one all-reduce of sums about ``about``, see :func:`joined_moments`. Differentiable in ``var``.

    Shapes: mean, var and about ``(channels,)`` -> ``(channels,)``.
    """
    if not distributed(process_group):
        return var
    away = mean - about.to(mean.dtype)
    each = torch.cat([torch.ones_like(away[:1]), away, var + away.square()])
    each = each if count else each.nan_to_num()  # an empty share still takes part
    total = _all_reduce(each * count, process_group)
    away, square = (total[1:] / total[0]).chunk(2)
    return square - away.square()


def _without_nan(moments: Moments) -> Moments:
    covs = tuple(cov.nan_to_num() for cov in moments.covs)
    return moments._replace(mean=moments.mean.nan_to_num(), covs=covs)


def _sums(moments: Moments, blocks: Blocks, about: Tensor) -> Tensor:
    """Count, and sums over the rows about ``about`` of what there are moments of, in one vector."""
    total = moments.total
    count = total.reshape(1) if isinstance(total, Tensor) else moments.mean.new_full((1,), total)
    away = moments.mean - about.to(moments.mean.dtype)
    squares = zip(moments.covs, blocks.outer(away), strict=False)
    return torch.cat([count, away * count, *((cov + square).flatten() * count for cov, square in squares)])


def _joined(sums: Tensor, mine: Moments, blocks: Blocks, about: Tensor) -> Moments:
    """The moments that the sums of all processes give; shapes are those of ``mine``."""
    total, sizes = sums[0], [mine.mean.numel(), *(cov.numel() for cov in mine.covs)]
    away, *squares = (sums[1:] / total).split(sizes)
    covs = tuple(
        square.reshape(cov.shape) - outer
        for square, cov, outer in zip(squares, mine.covs, blocks.outer(away), strict=False)
    )
    return Moments(away + about.to(away.dtype), covs, mine.rows, total)


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
