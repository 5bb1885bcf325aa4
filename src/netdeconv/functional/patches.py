"""Taking patches out of an activation: every position, or a sample of them, without a full im2col."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["Window", "corner_patches", "spread_patches"]

# Inverse powers of the root of g**4 = g + 1, the generalised golden ratio: multiples of them, modulo one,
# fill the unit cube evenly. One for the image, three for the space. (M. Roberts, "The unreasonable
# effectiveness of quasirandom sequences", 2018.)
_STEPS = (0.8191725133961645, 0.6710436067037893, 0.5497004779019703, 0.4502995220980296)


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

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Positions of the window along every dimension of an input of this spatial size."""
        return tuple(
            (length + sum(pads) - dilation * (kernel - 1) - 1) // stride + 1
            for length, kernel, stride, dilation, pads in zip(
                size, self.kernel_size, self.stride, self.dilation, self.padding, strict=True
            )
        )


def spread_patches(
    x: Tensor,
    window: Window,
    *,
    sampling_stride: int = 1,
    max_samples: int | None = None,
    turn: Tensor | None = None,
) -> Tensor:
    """Patches at positions spread evenly over the map, all of them when they fit ``max_samples``.

    On a map with more positions than that, about every ``sampling_stride``-th is taken along each dimension,
    fewer where the budget asks for it, and images are left out only when one position each is too many.

    Shapes: x ``(N, C, *spatial)`` -> ``(rows, C * taps)``, in x's dtype.

    Args:
        x: input of the convolution.
        window: what the convolution looks at.
        sampling_stride: wanted distance of sampled positions, in output positions.
        max_samples: most rows; ``None`` for no limit.
        turn: 0-dim integer tensor that counts refreshes: other positions on every turn, all of them after
            some turns. It stays on its device. ``None`` looks at the same positions every time.
    """
    size = window.output_size(x.shape[2:])
    images, counts = _budget(x.shape[0], size, sampling_stride, max_samples)
    offset = None if turn is None else turn.to(torch.float64)
    if images < x.shape[0]:
        x = x.index_select(0, _spread(x.shape[0], images, offset, _STEPS[0], x.device))
    positions = [
        _spread(length, count, offset, step, x.device)
        for length, count, step in zip(size, counts, _STEPS[1:], strict=False)
    ]
    return _gather(x, window, positions)


def corner_patches(x: Tensor, window: Window, *, sampling_stride: int = 1) -> Tensor:
    """Patches at a fixed grid that starts in the top left corner, as the published procedure takes them.

    For 1x1 kernels the published procedure takes every k-th row of the flattened batch instead and ignores
    the padding; k is the product of ``sampling_stride * stride`` over the dimensions.

    Shapes: x ``(N, C, *spatial)`` -> ``(rows, C * taps)``.
    """
    if window.taps == 1:
        every = math.prod(sampling_stride * stride for stride in window.stride)
        return x.movedim(1, -1).reshape(-1, x.shape[1])[::every]
    size = window.output_size(x.shape[2:])
    return _gather(x, window, [torch.arange(0, length, sampling_stride, device=x.device) for length in size])


def _budget(
    batch: int, size: tuple[int, ...], sampling_stride: int, max_samples: int | None
) -> tuple[int, tuple[int, ...]]:
    """How many images, and how many positions along every dimension, are looked at."""
    if max_samples is None or batch * math.prod(size) <= max_samples:
        return batch, size if max_samples is not None else tuple(-(-length // sampling_stride) for length in size)
    counts = tuple(-(-length // sampling_stride) for length in size)
    while batch * math.prod(counts) > max_samples and any(count > 1 for count in counts):
        sampling_stride += 1
        counts = tuple(-(-length // sampling_stride) for length in size)
    return min(batch, max_samples), counts


def _spread(length: int, count: int, turn: Tensor | None, step: float, device: torch.device) -> Tensor:
    """``count`` of ``length`` indices at even distance, shifted by a share of that distance on every turn."""
    index = torch.arange(count, device=device)
    if count == length:
        return index
    shift: Tensor | float = 0.5 if turn is None else torch.frac(turn * step + 0.5)
    return ((index + shift) * (length / count)).to(torch.int64).clamp_(max=length - 1)


def _gather(x: Tensor, window: Window, positions: Sequence[Tensor]) -> Tensor:
    """Rows of patches at the grid of these output positions."""
    batch, channels = x.shape[:2]
    split: list[int] = []
    inside = torch.ones((), dtype=x.dtype, device=x.device)
    masked = False
    for dim, at in enumerate(positions):
        length, (before, after) = x.shape[2 + dim], window.padding[dim]
        taps = torch.arange(window.kernel_size[dim], device=x.device) * window.dilation[dim]
        index = (at.unsqueeze(1) * window.stride[dim] + taps - before).flatten()
        here = torch.ones_like(index, dtype=x.dtype)
        if before or after:
            if window.padding_mode == "zeros":
                masked, here = True, ((index >= 0) & (index < length)).to(x.dtype)
            index = _pad_index(index, length, window.padding_mode)
        inside = inside.unsqueeze(-1) * here
        x = x.index_select(2 + dim, index)
        split += [at.numel(), window.kernel_size[dim]]
    if masked:
        x = x * inside
    dims = len(positions)  # (N, C, L1, k1, L2, k2, ...) -> (N, L1, L2, ..., C, k1, k2, ...)
    x = x.reshape(batch, channels, *split).permute(0, *range(2, 2 + 2 * dims, 2), 1, *range(3, 3 + 2 * dims, 2))
    return x.reshape(-1, channels * window.taps)


def _pad_index(index: Tensor, length: int, mode: str) -> Tensor:
    """Where in the unpadded input the entries of the padded one come from."""
    if mode == "circular":
        return index.remainder(length)
    if mode == "reflect":
        return (length - 1) - ((length - 1) - index.abs()).abs()
    return index.clamp(0, length - 1)
