"""Joining the moments of several processes into those of the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from netdeconv.errors import StatisticsError
from netdeconv.functional import Blocks, Moments
from netdeconv.functional.precision import without_autocast

__all__ = ["Share", "check_same_mode", "distributed", "joined_moments", "share_of_channels"]


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


class Share(NamedTuple):
    """What one process has to say: moments of its rows, how the rows are cut, and a point, the same everywhere, that
    sums are taken about, of ``blocks.mean_shape``."""

    moments: Moments
    blocks: Blocks
    about: Tensor


def joined_moments(shares: Sequence[Share], process_group: Any = None) -> list[Moments]:
    """Moments of the rows of all processes together, by one all-reduce of count-weighted sums.

    Sums are taken about the running mean, or one near it: about zero, a mean that is large beside the deviation would
    cost the covariance its digits. Without covariances only the mean is joined. Outside distributed training,
    and with one process, the moments come back unchanged. Differentiable.

    Args:
        shares: e.g. of all rows and of a sample; they travel together.
        process_group: processes to join; ``None`` for all.
    """
    if not distributed(process_group):
        return [share.moments for share in shares]
    with without_autocast(shares[0].about.device.type):
        # An empty share still takes part, in the backward pass too, or the others would wait for it.
        shares = [share if share.moments.rows else _without_nan(share) for share in shares]
        sums = [_sums(share) for share in shares]
        joined = _all_reduce(torch.cat(sums), process_group).split([len(part) for part in sums])
        return [_joined(part, share) for part, share in zip(joined, shares, strict=True)]


def share_of_channels(mean: Tensor, var: Tensor, count: int, about: Tensor) -> Share:
    """Mean and variance of every channel, ``(channels,)``, over so many entries, as moments that can be joined.

    Both with their gradient: that of the joined variance goes through the mean of every process.
    """
    blocks = Blocks(len(mean), 1, len(mean), 1)
    return Share(Moments(mean, (var.reshape(blocks.root_shapes[0]),), count, count), blocks, about)


def _without_nan(share: Share) -> Share:
    mean, covs, rows, total = share.moments
    mean, covs = mean.nan_to_num(), tuple(cov.nan_to_num() for cov in covs)
    return share._replace(moments=Moments(mean, covs, rows, total))


def _sums(share: Share) -> Tensor:
    """Count, and sums over the rows about ``about`` of what there are moments of, in one vector."""
    moments, blocks, about = share
    total = moments.total
    count = total.reshape(1) if isinstance(total, Tensor) else moments.mean.new_full((1,), total)
    away = moments.mean - about.to(moments.mean.dtype)
    squares = zip(moments.covs, blocks.outer(away), strict=False)
    return torch.cat([count, away * count, *((cov + square).flatten() * count for cov, square in squares)])


def _joined(sums: Tensor, share: Share) -> Moments:
    """The moments that the sums of all processes give; shapes are those of the share's."""
    mine, blocks, about = share
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
