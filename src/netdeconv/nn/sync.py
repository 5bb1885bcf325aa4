"""Joining the moments of several processes into those of the whole batch."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.nn.parallel import DistributedDataParallel

from netdeconv.errors import StatisticsError
from netdeconv.functional import Blocks, Moments
from netdeconv.functional.precision import at_least_float32, without_autocast
from netdeconv.functional.tracing import cached_constant

__all__ = [
    "Place",
    "Share",
    "check_not_joining",
    "check_same_mode",
    "distributed",
    "joined_moments",
    "share_of_channels",
]

_ELSEWHERE = (
    "expected all processes to call the same layers in the same order with the same weights and running means, as "
    "SyncBatchNorm does; build layers that some processes skip with WhiteningConfig(sync=False)"
)
_PRIME, _WHOLE = 4093, 3  # the first numbers are whole ones below it, in float32 without rounding
_DIGITS, _LEAST = 1e-2, 1e-6  # of the others: processors round differently, and layers differ by more


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


def check_not_joining(label: str) -> None:
    """Refuse ``DistributedDataParallel.join()``, in which a process without inputs left answers no other calls.

    Raises:
        StatisticsError: it would, and the others would mix its gradients with statistics.
    """
    model = getattr(DistributedDataParallel, "_active_ddp_module", None)
    join = getattr(model, "_join_config", None)
    if join is not None and join.enable and not join.throw_on_early_termination:
        raise StatisticsError(
            f"{label}: expected all processes to take part in every step, got DistributedDataParallel.join(), which "
            "lets one run out of inputs. Pass throw_on_early_termination=True to join(), as for SyncBatchNorm, or "
            "build the layers with WhiteningConfig(sync=False)."
        )


class Place(NamedTuple):
    """Which layer, and which of its calls, statistics are of: what it is called, and numbers that others differ in."""

    label: str
    numbers: Tensor

    @classmethod
    def of(cls, label: str, name: str, step: Tensor, values: Sequence[Tensor]) -> Place:
        """Told apart from others by a name, a step, and entries of tensors that all processes have alike."""
        dtype, device = at_least_float32(values[0].dtype), values[0].device
        parts = [_code(f"{label} {name}", dtype, device), (step % _PRIME).reshape(1).to(dtype)]
        for value in values:
            flat = value.detach().flatten()
            parts += [flat[place : place + 1].to(dtype) for place in (0, len(flat) // 2, len(flat) - 1)]
        return cls(label, torch.cat(parts).nan_to_num())

    @property
    def on_cpu(self) -> bool:
        """Whether the numbers can be looked at without waiting."""
        return self.numbers.device.type == "cpu"

    def in_own_row(self, process_group: Any) -> Tensor:
        """A row for every process, of which this one is filled; the sum over processes fills the others."""
        rows = self.numbers.new_zeros(dist.get_world_size(process_group), len(self.numbers))
        rows[dist.get_rank(process_group)] = self.numbers
        return rows

    def everywhere(self, rows: Tensor) -> Tensor:
        """Whether all processes are here, by their rows."""
        rows = rows.reshape(-1, len(self.numbers))
        same = (rows[:, :_WHOLE] == self.numbers[:_WHOLE]).all()
        return same & torch.isclose(rows[:, _WHOLE:], self.numbers[_WHOLE:], rtol=_DIGITS, atol=_LEAST).all()

    def check(self, process_group: Any) -> None:
        """Compare with all processes.

        Raises:
            StatisticsError: they are not all here.
        """
        rows = self.in_own_row(process_group)
        dist.all_reduce(rows, group=process_group)
        if self.everywhere(rows):
            return
        labels: list[str] = [""] * len(rows)
        dist.all_gather_object(labels, self.label, group=process_group)
        got = ", ".join(f"{label} in process {rank}" for rank, label in enumerate(labels))
        raise StatisticsError(f"{self.label}: {_ELSEWHERE}, got {got}.")


@cached_constant
def _code(name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    code = zlib.crc32(name.encode())
    return torch.tensor([code % _PRIME, code // _PRIME % _PRIME], dtype=dtype, device=device)


class Share(NamedTuple):
    """What one process has to say: moments of its rows, how the rows are cut, and a point, the same everywhere, that
    sums are taken about, of ``blocks.mean_shape``."""

    moments: Moments
    blocks: Blocks
    about: Tensor


def joined_moments(
    shares: Sequence[Share], process_group: Any = None, place: Place | None = None
) -> list[Moments]:
    """Moments of the rows of all processes together, by one all-reduce of count-weighted sums.

    Sums are taken about the running mean, or one near it: about zero, a mean that is large beside the deviation would
    cost the covariance its digits. Without covariances only the mean is joined. Outside distributed training,
    and with one process, the moments come back unchanged. Differentiable.

    Args:
        shares: e.g. of all rows and of a sample; they travel together.
        process_group: processes to join; ``None`` for all.
        place: what the moments are of, which has to be the same everywhere. On a CPU that is compared first, as sums
            of another length would end the process; elsewhere it travels with the sums.

    Raises:
        StatisticsError: processes are at different places, on a CPU; on other devices torch reports an assertion.
    """
    if not distributed(process_group):
        return [share.moments for share in shares]
    with without_autocast(shares[0].about.device.type):
        # An empty share still takes part, in the backward pass too, or the others would wait for it.
        shares = [share if share.moments.rows else _without_nan(share) for share in shares]
        sums = [_sums(share) for share in shares]
        if place is not None and place.on_cpu:
            place.check(process_group)
        elif place is not None:  # to look would mean to wait for the device
            sums.insert(0, place.in_own_row(process_group).flatten())
        joined = list(_all_reduce(torch.cat(sums), process_group).split([len(part) for part in sums]))
        if len(joined) > len(shares) and place is not None:
            torch._assert_async(place.everywhere(joined.pop(0)), f"{place.label}: {_ELSEWHERE}")
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
