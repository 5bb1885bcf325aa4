"""Which channels are whitened together: the flattened (channel, tap) index, cut into blocks."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from netdeconv.functional.patches import Window

__all__ = ["Blocks", "neighbours_together"]

# Most features of a block, and most entries of a layer's roots together, those of smaller last blocks included: 64 MiB
# in float32. Ordinary networks stay far below; 31x31 kernels do not.
_FEATURES, _ENTRIES = 1024, 2**24


def neighbours_together(count: int, most: int, features: int, groups: int, *, even: bool = False) -> int:
    """How many of ``count`` neighbours form a block, so that blocks have at most 1024 features and roots 2**24 entries.

    ``most`` of them where that fits; otherwise as few blocks as fit, as equal as they come, and 1 where nothing fits.

    >>> neighbours_together(64, 32, 9, 1), neighbours_together(64, 32, 125, 1), neighbours_together(31, 31, 31, 256)
    (32, 8, 7)

    Args:
        count: channels of a group, or rows of a kernel.
        most: how many are wanted.
        features: of one of them.
        groups: convolution groups, each of which has roots of its own.
        even: rather a number that divides ``count``, where that is more than half of what fits.
    """
    shares = (-(-count // blocks) for blocks in range(-(-count // most), count + 1))
    fitting = (size for size in (min(most, count), *shares) if _fit(size, count % size, features, groups))
    first = next(fitting, 1)
    return next((size for size in range(first, first // 2, -1) if count % size == 0), first) if even else first


def _fit(size: int, rest: int, features: int, groups: int) -> bool:
    """Whether roots fit of blocks of so many neighbours, and of a smaller last one."""
    return size * features <= _FEATURES and groups * features**2 * (size**2 + rest**2) <= _ENTRIES


def _piece(channels: int, window: Window, groups: int) -> int | None:
    """Taps that form a block, of so many channels in a group; ``None`` where all of a channel's can."""
    if _fit(1, 0, window.taps, groups):
        return None
    row, several = window.kernel_size[-1], channels > 1
    if _fit(1, 0, row, groups):
        return row * neighbours_together(window.taps // row, window.taps, row, groups, even=several)
    return neighbours_together(window.taps, window.taps, 1, groups, even=several)


def _derived() -> Any:
    """A field that follows from the others, and is worked out once."""
    return dataclasses.field(init=False, repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The cut of one layer's input patches into blocks; all blocks of a part share one root.

    A patch of ``channels`` x ``taps`` numbers is flattened to the index ``channel * taps + tap``, as
    ``torch.nn.functional.unfold`` does. It falls into ``groups`` convolution groups, each of them into a part
    of equal blocks of ``block_size`` channels and, where these do not come out even, a part that is one
    smaller block. With a ``piece`` a block is so many neighbouring taps of one channel, and the second part is what is
    left of every channel.

    Args:
        channels: input channels of the layer.
        taps: positions of the kernel, 9 for 3x3, 1 for a linear layer.
        groups: convolution groups; statistics never cross them.
        block_size: channels of a block, at most those of a group.
        interleaved: assign the flattened index to the blocks round-robin, as in the paper, instead of cutting it
            into contiguous pieces; the block size must divide the channels of a group.
        pool_mean: one mean for all blocks of a part, as published, instead of one for every channel and tap.
        piece: taps of a block that is less than a channel, ``None`` for blocks of whole channels; not interleaved.

    Attributes:
        group_features: length of the flattened index within one group.
        parts: ``(blocks, features of a block)`` of the part of equal blocks, then of the smaller last ones.
        mean_shape: shape of the running mean: one entry per channel and tap, or per pooled feature.
        root_shapes: shape of the running root of every part; the groups come first where there are several.
    """

    channels: int
    taps: int
    groups: int
    block_size: int
    interleaved: bool = False
    pool_mean: bool = False
    piece: int | None = None
    group_features: int = _derived()
    parts: tuple[tuple[int, int], ...] = _derived()
    mean_shape: tuple[int] = _derived()
    root_shapes: tuple[tuple[int, ...], ...] = _derived()

    def __post_init__(self) -> None:
        per_group = self.channels // self.groups
        features = per_group * self.taps
        runs, size = (1, self.block_size * self.taps) if self.piece is None else (per_group, self.piece)
        count, left = divmod(features // runs, size)  # of each of the runs that are cut into blocks
        equal = (runs * count, size)
        parts = (equal, (runs, left)) if left else (equal,)
        lead = (self.groups,) if self.groups > 1 else ()
        derived = {
            "group_features": features,
            "parts": parts,
            "mean_shape": (self.groups * (equal[1] if self.pool_mean else features),),
            "root_shapes": tuple((*lead, size, size) for _, size in parts),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @classmethod
    def plan(cls, channels: int, window: Window, groups: int, block_size: int, grouping: str) -> Blocks:
        """The cut that a layer uses for the wanted block size and grouping.

        ``"contiguous"`` takes the block size, or the channels of a group where these are fewer. Where one channel's
        taps are too many for a block (:func:`neighbours_together`), a block is as many whole rows of the kernel as fit,
        its last dimension, or a piece of the taps where a row is too long; of several channels in a group pieces that
        come out even, if these are not much smaller, as they are cut without a copy.
        ``"interleaved"`` follows the authors' code: with groups a block is a whole group, without them the
        greatest common divisor of block size and channels; linear layers, which have no window, have contiguous
        blocks. The mean is pooled.
        """
        per_group = channels // groups
        block_size = min(block_size, per_group)
        if grouping == "contiguous":
            piece = _piece(per_group, window, groups)
            return cls(channels, window.taps, groups, block_size if piece is None else 1, piece=piece)
        block_size = per_group if groups > 1 else math.gcd(block_size, channels)
        return cls(channels, window.taps, groups, block_size, interleaved=bool(window.kernel_size), pool_mean=True)

    @property
    def single(self) -> bool:
        """Whether everything is whitened together."""
        return self.groups == 1 and self.parts == ((1, self.group_features),)

    def split(self, x: Tensor) -> list[Tensor]:
        """Cut ``(..., group_features)`` into parts of shape ``(..., blocks, features)``."""
        count, size = self.parts[0]
        lead = x.shape[:-1]
        if self.interleaved:
            return [x.reshape(*lead, size, count).transpose(-1, -2)]
        if len(self.parts) == 1:
            return [x.reshape(*lead, count, size)]
        repeats, left = self.parts[1]
        cut = count * size // repeats
        runs = x.reshape(*lead, repeats, cut + left)
        return [runs[..., :cut].reshape(*lead, count, size), runs[..., cut:]]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`split`."""
        if self.interleaved:
            return parts[0].transpose(-1, -2).flatten(-2)
        if len(parts) == 1:
            return parts[0].flatten(-2)
        (count, size), (repeats, _) = self.parts
        equal, rest = parts
        return torch.cat([equal.reshape(*equal.shape[:-2], repeats, count * size // repeats), rest], dim=-1).flatten(-2)

    def spread_mean(self, mean: Tensor) -> Tensor:
        """The running mean as ``(groups, group_features)``, one entry for every channel and tap."""
        if not self.pool_mean:
            return mean.reshape(self.groups, self.group_features)
        count, size = self.parts[0]
        return self.join([mean.reshape(self.groups, 1, size).expand(-1, count, -1)])

    def pooled_mean(self, mean: Tensor) -> Tensor:
        """One mean for every channel and tap, flat ``(channels * taps,)``, as ``mean_shape`` has it."""
        if not self.pool_mean:
            return mean
        (part,) = self.split(mean.reshape(self.groups, self.group_features))
        return part.mean(1).flatten()

    def outer(self, away: Tensor) -> list[Tensor]:
        """``away away^T`` for a difference of two means, averaged over the blocks that share a covariance.

        Shapes: ``mean_shape`` -> one matrix for every part, as ``root_shapes``.
        """
        grouped = away.reshape(self.groups, -1)
        parts = [grouped.unsqueeze(1)] if self.pool_mean else self.split(grouped)
        return [
            (part.mT @ part / part.shape[-2]).reshape(shape)
            for part, shape in zip(parts, self.root_shapes, strict=True)
        ]

    def of_channels(self, value: Tensor) -> Tensor:
        """A number of every channel as ``(groups, group_features)``, the same for all taps."""
        return value.unsqueeze(-1).expand(-1, self.taps).reshape(self.groups, self.group_features)

    def sum_of_channels(self, rows: Tensor) -> Tensor:
        """``(groups, rows, group_features)`` summed over rows and taps, ``(channels,)``.

        One after the other: torch's sum over both at once takes 15 times as long for 512 channels of 3x3.
        """
        return rows.sum(1).reshape(-1, self.taps).sum(1)

    def times_channels(self, rows: Tensor, value: Tensor, *, in_place: bool = False) -> Tensor:
        """``(groups, rows, group_features)`` times a number of every channel, or a row of them for each group.

        Written out for every tap, as torch multiplies by a row several times as fast as by a broadcast column of it.
        """
        each = value if value.dim() == 3 else self.of_channels(value).unsqueeze(1)
        return rows.mul_(each) if in_place else rows * each
