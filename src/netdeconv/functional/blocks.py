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

__all__ = ["Blocks"]


def _derived() -> Any:
    """A field that follows from the others, and is worked out once."""
    return dataclasses.field(init=False, repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The cut of one layer's input patches into blocks; all blocks of a part share one root.

    A patch of ``channels`` x ``taps`` numbers is flattened to the index ``channel * taps + tap``, as
    ``torch.nn.functional.unfold`` does. It falls into ``groups`` convolution groups, each of them into a part
    of equal blocks of ``block_size`` channels and, where these do not come out even, a part that is one
    smaller block.

    Args:
        channels: input channels of the layer.
        taps: positions of the kernel, 9 for 3x3, 1 for a linear layer.
        groups: convolution groups; statistics never cross them.
        block_size: channels of a block, at most those of a group.
        interleaved: deal the flattened index out to the blocks in turn, as published, instead of cutting it
            into contiguous pieces; the block size must divide the channels of a group.
        pool_mean: one mean for all blocks of a part, as published, instead of one for every channel and tap.

    Attributes:
        group_features: length of the flattened index within one group.
        parts: ``(blocks, features of a block)`` of the part of equal blocks, then of the smaller last one.
        mean_shape: shape of the remembered mean: one entry per channel and tap, or per pooled feature.
        root_shapes: shape of the remembered root of every part; the groups come first where there are several.
    """

    channels: int
    taps: int
    groups: int
    block_size: int
    interleaved: bool = False
    pool_mean: bool = False
    group_features: int = _derived()
    parts: tuple[tuple[int, int], ...] = _derived()
    mean_shape: tuple[int] = _derived()
    root_shapes: tuple[tuple[int, ...], ...] = _derived()

    def __post_init__(self) -> None:
        per_group = self.channels // self.groups
        count, left = divmod(per_group, self.block_size)
        equal, features = (count, self.block_size * self.taps), per_group * self.taps
        parts = (equal, (1, left * self.taps)) if left else (equal,)
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

        ``"contiguous"`` takes the block size, or the channels of a group where these are fewer.
        ``"interleaved"`` follows the authors' code: with groups a block is a whole group, without them the
        greatest common divisor of block size and channels; linear layers, which have no window, have contiguous
        blocks. The mean is pooled.
        """
        per_group = channels // groups
        block_size = min(block_size, per_group)
        if grouping == "contiguous":
            return cls(channels, window.taps, groups, block_size)
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
        cut = count * size
        return [x[..., :cut].reshape(*lead, count, size), x[..., cut:].unsqueeze(-2)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`split`."""
        if self.interleaved:
            return parts[0].transpose(-1, -2).flatten(-2)
        return torch.cat([part.flatten(-2) for part in parts], dim=-1) if len(parts) > 1 else parts[0].flatten(-2)

    def spread_mean(self, mean: Tensor) -> Tensor:
        """The remembered mean as ``(groups, group_features)``, one entry for every channel and tap."""
        if not self.pool_mean:
            return mean.reshape(self.groups, self.group_features)
        count, size = self.parts[0]
        return self.join([mean.reshape(self.groups, 1, size).expand(-1, count, -1)])

    def pooled_mean(self, mean: Tensor) -> Tensor:
        """One mean for every channel and tap, flat ``(channels * taps,)``, as it is remembered."""
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

    def times_channels(self, rows: Tensor, value: Tensor, *, in_place: bool = False) -> Tensor:
        """``(groups, rows, group_features)`` times a number of every channel."""
        parts = rows.reshape(self.groups, -1, self.channels // self.groups, self.taps)
        each = value.reshape(self.groups, 1, -1, 1)
        return (parts.mul_(each) if in_place else parts * each).reshape(rows.shape)
