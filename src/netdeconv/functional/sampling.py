"""Which patches statistics are taken from: spread over map or grid, the border included, or those of the paper."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from netdeconv.functional.patches import gather_patches

if TYPE_CHECKING:
    from torch import Tensor

    from netdeconv.functional.patches import Window

__all__ = ["Sample", "corner_patches", "spread_patches"]

# Inverse powers of the root of g**4 = g + 1, the generalised golden ratio: multiples of them, modulo one,
# fill the unit cube evenly. One for the image, three for the space. (M. Roberts, "The unreasonable
# effectiveness of quasirandom sequences", 2018.)
_STEPS = (0.8191725133961645, 0.6710436067037893, 0.5497004779019703, 0.4502995220980296)

_PERIOD = 4096  # turns after which the positions repeat, so that float32 tells them apart

# Positions along one dimension: before the interior (the window reaches over the edge), inside, after it.
Zones = tuple[int, int, int]


class Sample(NamedTuple):
    """Flattened patches ``(rows, channels * taps)`` and how many patches each stands for; ``None``: one each."""

    rows: Tensor
    weights: Tensor | None


def spread_patches(
    x: Tensor,
    window: Window,
    *,
    grid: int = 1,
    sampling_stride: int = 1,
    max_samples: int | None = None,
    turn: Tensor | None = None,
) -> Sample:
    """Patches at positions spread evenly over a grid on the map, all of them when they fit ``max_samples``.

    On a grid with more positions than that, about every ``sampling_stride``-th is taken along each dimension, fewer
    where the limit requires it, and images are left out only when that does not suffice. Positions of the grid where
    the window reaches over the edge are always included: padded patches occur nowhere else, and statistics without them
    would give them the largest gain. Rows are weighted with the number of positions they stand for, so the moments are
    those of the whole grid up to sampling noise.

    Shapes: x ``(N, C, *spatial)`` -> rows ``(rows, C * taps)`` in x's dtype, weights ``(rows,)`` or ``None``.

    Args:
        x: input of the convolution.
        window: what the convolution looks at.
        grid: distance of the grid's positions, in output positions, from the top left corner on.
        sampling_stride: wanted distance of sampled positions, in positions of the grid.
        max_samples: most rows; ``None`` for no limit. At least one row per kind of border is taken all the same.
        turn: 0-dim integer tensor that counts refreshes: other positions on every turn, all of them after
            some turns. It stays on its device. ``None`` looks at the same positions every time.
    """
    batch = x.shape[0]
    size = window.output_size(x.shape[2:])
    zones = [_zones(length, edges, grid) for length, edges in zip(size, window.edges(x.shape[2:]), strict=True)]
    images, counts = _budget(batch, zones, sampling_stride, max_samples)
    offset = None if turn is None else (turn % _PERIOD).to(torch.float32)
    if images < batch:
        x = x.index_select(0, _evenly(batch, images, offset, _STEPS[0], x.device))
    positions = [
        torch.cat(
            [start + _evenly(zone, count, offset, step, x.device) for start, zone, count in _laid_out(along, taken)]
        )
        * grid
        for along, taken, step in zip(zones, counts, _STEPS[1:], strict=False)
    ]
    weights = None
    if counts != zones or images < batch:
        dtype = torch.promote_types(x.dtype, torch.float32)
        weights = torch.full((), batch / max(images, 1), dtype=dtype, device=x.device)
        for along, taken in zip(zones, counts, strict=True):
            shares = [weights.new_full((count,), zone / count) for _, zone, count in _laid_out(along, taken)]
            weights = weights.unsqueeze(-1) * torch.cat(shares)
        weights = weights.expand(x.shape[0], *weights.shape).flatten()
    return Sample(gather_patches(x, window, positions), weights)


def corner_patches(x: Tensor, window: Window, *, sampling_stride: int = 1) -> Sample:
    """Patches at a fixed grid that starts in the top left corner, as in the paper's procedure.

    For 1x1 kernels that is every k-th row of the flattened batch instead, without padding; k is the product of
    ``sampling_stride * stride`` over the dimensions.

    Shapes: x ``(N, C, *spatial)`` -> rows ``(rows, C * taps)``.
    """
    if window.taps == 1:
        # a list, as the compiler takes no generator
        every = math.prod([sampling_stride * stride for stride in window.stride])
        return Sample(x.movedim(1, -1).reshape(-1, x.shape[1])[::every], None)
    size = window.output_size(x.shape[2:])
    positions = [torch.arange(0, length, sampling_stride, device=x.device) for length in size]
    return Sample(gather_patches(x, window, positions), None)


def _zones(length: int, edges: tuple[int, int], grid: int) -> Zones:
    """Sizes of the zones, in positions of the grid; on a map smaller than the window's reach the first is served first.

    >>> _zones(8, (1, 1), 1), _zones(8, (1, 1), 3), _zones(4, (1, 1), 3), _zones(2, (1, 1), 3)
    ((1, 6, 1), (1, 2, 0), (1, 0, 1), (1, 0, 0))
    """
    count, before = -(-length // grid), -(-min(edges[0], length) // grid)
    after = min(count - -(-max(length - edges[1], 0) // grid), count - before)
    return before, count - before - after, after


def _budget(batch: int, zones: list[Zones], sampling_stride: int, max_samples: int | None) -> tuple[int, list[Zones]]:
    """How many images, and how many positions of every zone along every dimension, are looked at."""
    if max_samples is None:
        return batch, [_taken(along, sampling_stride) for along in zones]
    if batch * math.prod([sum(along) for along in zones]) <= max_samples:
        return batch, zones
    widest = max([sum(along) for along in zones], default=1)
    for distance in range(sampling_stride, max(sampling_stride, widest) + 1):
        counts = [_taken(along, distance) for along in zones]
        rows = math.prod([sum(taken) for taken in counts])
        if batch * rows <= max_samples:
            return batch, counts
    return min(batch, max(1, max_samples // rows)), counts


def _taken(along: Zones, distance: int) -> Zones:
    """Positions of every zone at this distance of samples; no zone is left out."""
    before, inside, after = [-(-zone // distance) for zone in along]
    return before, inside, after


def _laid_out(along: Zones, taken: Zones) -> list[tuple[int, int, int]]:
    """``(first position, size, samples)`` of the zones that have any."""
    starts = (0, along[0], along[0] + along[1])
    return [(start, zone, count) for start, zone, count in zip(starts, along, taken, strict=True) if zone]


def _evenly(length: int, count: int, turn: Tensor | None, step: float, device: torch.device) -> Tensor:
    """``count`` of ``length`` indices at even distance, shifted by a share of that distance on every turn."""
    index = torch.arange(count, device=device)
    if count == length:
        return index
    shift: Tensor | float = 0.5 if turn is None else torch.frac(turn * step + 0.5)
    return ((index + shift) * (length / count)).to(torch.int64).clamp(max=length - 1)
