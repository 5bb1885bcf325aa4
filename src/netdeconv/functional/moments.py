"""Mean and covariance of the patches a layer looks at, block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from netdeconv.functional.blocks import Blocks

__all__ = ["Moments", "patch_moments"]


class Moments(NamedTuple):
    """Moments of patches: ``mean`` flat as ``blocks.mean_shape``, one covariance per part, number of rows."""

    mean: Tensor
    covs: tuple[Tensor, ...]
    rows: int


def patch_moments(patches: Tensor, blocks: Blocks) -> Moments:
    """Mean and biased covariance (divided by the number of rows) of flattened patches.

    ``mean = 1/N sum x``, ``cov = 1/N sum (x - mean)(x - mean)^T``, N the rows and, as all blocks of a part
    share one covariance, the blocks. Nothing is added to the diagonal. The products are summed up in float32
    at least, also under autocast; accuracy is that of the centred data.

    Shapes: patches ``(rows, channels * taps)``, e.g. from :func:`netdeconv.functional.spread_patches` ->
    mean ``blocks.mean_shape``, covs ``blocks.root_shapes``.

    Source: Ye et al. 2020, algorithm 1, lines 3 and 4.
    """
    patches = patches.to(torch.promote_types(patches.dtype, torch.float32))
    rows = patches.shape[0]
    with torch.autocast(patches.device.type, enabled=False):
        grouped = patches.reshape(rows, blocks.groups, blocks.group_features)
        if not blocks.pool_mean:
            mean = grouped.mean(0)
            parts = blocks.split(grouped - mean)
        else:
            parts = blocks.split(grouped)
            mean = parts[0].mean((0, 2))
            parts = [parts[0] - mean.unsqueeze(1)]
        covs = tuple(_covariance(part).reshape(shape) for part, shape in zip(parts, blocks.root_shapes, strict=True))
    return Moments(mean.flatten(), covs, rows)


def _covariance(part: Tensor) -> Tensor:
    """(rows, groups, blocks, features) -> (groups, features, features)."""
    rows, groups, count, size = part.shape
    if groups == 1:
        flat = part.reshape(rows * count, size)
        return flat.T @ flat / (rows * count)
    flat = part.transpose(0, 1).reshape(groups, rows * count, size)
    return flat.mT @ flat / (rows * count)
