"""Taking patches out of an activation at chosen positions, without a full im2col."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch

from netdeconv.functional.precision import at_least_float32, without_autocast
from netdeconv.functional.scale import mean_over
from netdeconv.functional.tracing import cached_constant

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["Window", "gather_patches", "mean_patch"]

_SMALL = 9 * 4096  # taps times positions, up to which one matrix for all of them is small beside most maps


@dataclasses.dataclass(frozen=True)
class Window:
    """What a convolution looks at: one entry per spatial dimension; no entries for a linear layer.

    Args:
        kernel_size: taps along every dimension.
        stride: distance of neighbouring positions.
        dilation: distance of neighbouring taps.
        padding: ``(before, after)`` along every dimension.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``, as in ``torch.nn.Conv2d``.
    """

    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    padding_mode: str = "zeros"

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return math.prod(self.kernel_size)

    @property
    def sees_all_once(self) -> bool:
        """Whether every entry of the map is looked at by itself and once; so is every row without a map."""
        return self.taps == 1 and all(stride == 1 for stride in self.stride) and not any(map(any, self.padding))

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Positions of the window along every dimension of an input of this spatial size."""
        if len(size) != len(self.kernel_size):
            raise ValueError(f"Window: expected a size of {len(self.kernel_size)} dimensions, got {tuple(size)}.")
        return tuple(self.output_length(dim, length) for dim, length in enumerate(size))

    def output_length(self, dim: int, length: int) -> int:
        """Positions along one dimension of an input that is so long there."""
        reach = self.dilation[dim] * (self.kernel_size[dim] - 1) + 1
        return (length + sum(self.padding[dim]) - reach) // self.stride[dim] + 1

    def edges(self, size: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Along every dimension, how many of the first and of the last positions reach into the padding."""
        counted = []
        for length, positions, kernel, stride, dilation, (before, _) in zip(
            size,
            self.output_size(size),
            self.kernel_size,
            self.stride,
            self.dilation,
            self.padding,
            strict=True,
        ):
            first = min(-(-before // stride), positions)
            fits = (length + before - dilation * (kernel - 1) - 1) // stride + 1  # positions before the far edge
            counted.append((first, positions - min(max(fits, 0), positions)))
        return tuple(counted)


def gather_patches(x: Tensor, window: Window, positions: Sequence[Tensor]) -> Tensor:
    """Flattened patches at the grid of these output positions, one index tensor for every dimension.

    Padding is a rule for indices here: no padded copy of x is made. Differentiable.

    Shapes: x ``(N, C, *spatial)`` -> ``(N * positions, C * taps)``, in x's dtype; the order of taps is that of
    ``torch.nn.functional.unfold``.
    """
    batch, channels = x.shape[:2]
    split: list[int] = []
    inside = torch.ones((), dtype=x.dtype, device=x.device)
    for dim, at in enumerate(positions):
        index, here = _tap_index(window, dim, at, x.shape[2 + dim])
        inside = inside.unsqueeze(-1) * here.flatten().to(x.dtype)
        x = x.index_select(2 + dim, index.flatten())
        split += index.shape
    if window.padding_mode == "zeros" and any(map(any, window.padding)):
        x = x * inside
    dims = len(positions)  # (N, C, L1, k1, L2, k2, ...) -> (N, L1, L2, ..., C, k1, k2, ...)
    x = x.reshape(batch, channels, *split).permute(0, *range(2, 2 + 2 * dims, 2), 1, *range(3, 3 + 2 * dims, 2))
    return x.reshape(-1, channels * window.taps)


def mean_patch(x: Tensor, window: Window) -> Tensor:
    """The mean over the patches at all positions of all images, without taking any: one pass over x.

    Along each dimension, a tap sees an entry of the map as often as there are positions that put it there; the
    mean image is multiplied by these shares. Differentiable.

    Shapes: x ``(N, C, *spatial)`` -> ``(C * taps,)``, in float32 at least, also under autocast.
    """
    dtype = at_least_float32(x.dtype)
    size, channels = x.shape[2:], x.shape[1]
    if window.sees_all_once:
        return mean_over(x, [0, *range(2, x.dim())], dtype)
    turned = x if x.is_contiguous() else x.permute(0, *range(2, x.dim()), 1)
    channels_last = turned is not x and turned.is_contiguous()
    # The mean image keeps the order that x has in memory: a sum over images that jumps about is many times slower.
    mean = mean_over(turned if channels_last else x, [0], dtype)
    with without_autocast(x.device.type):
        if window.taps * math.prod(size) <= _SMALL:
            shares = _map_shares(window, tuple(size), dtype, x.device)
            mean = (mean.flatten(0, -2).T if channels_last else mean.flatten(1)) @ shares
            return mean.flatten()
        before, behind = 1 if channels_last else channels, mean.numel() // (1 if channels_last else channels)
        for dim, length in enumerate(size):
            behind //= length
            shares = _tap_shares(window, dim, length, dtype, x.device)
            mean = shares @ mean.reshape(before, length, behind)
            before *= window.kernel_size[dim]
    return (mean.reshape(window.taps, channels).T if channels_last else mean).flatten()


@cached_constant
def _map_shares(window: Window, size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``(positions of the map, taps)``: :func:`_tap_shares` of all dimensions, multiplied."""
    shares = torch.ones(1, 1, dtype=dtype, device=device)
    for dim, length in enumerate(size):
        shares = torch.kron(shares, _tap_shares(window, dim, length, dtype, device))
    return shares.mT


@cached_constant
def _tap_shares(window: Window, dim: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``(taps, length)``: at which share of the positions along a dimension a tap sees each entry."""
    positions = window.output_length(dim, length)
    index, here = _tap_index(window, dim, torch.arange(positions, device=device), length)
    seen = (index.T.unsqueeze(-1) == torch.arange(length, device=device)) & here.T.unsqueeze(-1)
    return seen.sum(1) / torch.full((), positions, dtype=dtype, device=device)


def _tap_index(window: Window, dim: int, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """``(positions, taps)``: where in the unpadded input the taps lie, and whether they lie inside it."""
    taps = torch.arange(window.kernel_size[dim], device=positions.device) * window.dilation[dim]
    index = positions.unsqueeze(1) * window.stride[dim] + taps - window.padding[dim][0]
    if window.padding_mode == "zeros":
        return index.clamp(0, length - 1), (index >= 0) & (index < length)
    if window.padding_mode == "circular":
        index = index.remainder(length)
    elif window.padding_mode == "reflect":
        index = (length - 1) - ((length - 1) - index.abs()).abs()
    else:
        index = index.clamp(0, length - 1)
    return index, torch.ones_like(index, dtype=torch.bool)
