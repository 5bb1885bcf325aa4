"""Mean and covariance of a layer's input patches, block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from netdeconv.functional.precision import without_autocast

if TYPE_CHECKING:
    from torch import Tensor

    from netdeconv.functional.blocks import Blocks

__all__ = ["Moments", "patch_moments"]


class Moments(NamedTuple):
    """Moments of patches: ``mean`` flat as ``blocks.mean_shape``, one covariance per part, the number of rows, and of
    the patches that they stand for (a 0-dim tensor where that is the sum of weights).

    The covariance of few rows may be given by a factor, ``cov = factor^T factor``: the centred rows divided by the
    square root of their number, fewer than features.
    """

    mean: Tensor
    covs: tuple[Tensor, ...]
    rows: int
    total: Tensor | int


def patch_moments(
    patches: Tensor, blocks: Blocks, weights: Tensor | None = None, *, factored: bool = False, pooled: bool = True
) -> Moments:
    """Mean and biased covariance (divided by the number of patches) of flattened patches.

    ``mean = sum w x / sum w``, ``cov = sum w (x - mean)(x - mean)^T / sum w``, over the rows and, as all blocks
    of a part share one covariance, the blocks. Nothing is added to the diagonal. The products are summed up in
    float32 at least, also under autocast; accuracy is that of the centred data.

    Shapes: patches ``(rows, channels * taps)`` and weights ``(rows,)``, e.g. from
    :func:`netdeconv.functional.spread_patches` -> mean ``blocks.mean_shape``, covs ``blocks.root_shapes``.

    Args:
        patches: flattened patches.
        blocks: how they are cut.
        weights: how many patches each row stands for; ``None`` for one each.
        factored: factors instead of covariances for parts with at most a quarter as many rows as features; not with
            weights or groups.
        pooled: one covariance for all blocks of a part; otherwise one for each, ``(groups, blocks, n, n)``.

    Source: Ye et al. 2020, algorithm 1, lines 3 and 4.
    """
    rows = patches.shape[0]
    x = patches.to(torch.promote_types(patches.dtype, torch.float32)).reshape(
        rows, blocks.groups, blocks.group_features
    )
    with without_autocast(x.device.type):
        total = rows if weights is None else weights.sum().to(x.dtype)
        share = None if weights is None else weights.to(x.dtype) / total
        if blocks.pool_mean:
            (part,) = blocks.split(x)
            mean = _mean(part.mean(2), share)
            parts = [part - mean.unsqueeze(1)]
        else:
            mean = _mean(x, share)
            parts = blocks.split(x - mean)
        covs = tuple(
            _factor(part)
            if factored and share is None and _is_short(part)
            else _covariance(part, share).reshape(shape)
            if pooled
            else _covariance(part.flatten(1, 2).unsqueeze(2), share).reshape(*part.shape[1:3], *shape[-2:])
            for part, shape in zip(parts, blocks.root_shapes, strict=True)
        )
    return Moments(mean.flatten(), covs, rows, total)


def _mean(x: Tensor, share: Tensor | None) -> Tensor:
    """(rows, groups, features) -> (groups, features)."""
    return x.mean(0) if share is None else (share @ x.flatten(1)).reshape(x.shape[1:])


def _is_short(part: Tensor) -> bool:
    rows, groups, count, size = part.shape
    return groups == 1 and 4 * rows * count <= size


def _factor(part: Tensor) -> Tensor:
    """(rows, 1, blocks, features), centred -> (rows * blocks, features), whose square is the covariance."""
    flat = part.flatten(0, 2)
    return flat * len(flat) ** -0.5


def _covariance(part: Tensor, share: Tensor | None) -> Tensor:
    """(rows, groups, blocks, features), centred -> (groups, features, features)."""
    rows, groups, count, size = part.shape
    divisor = rows * count
    if share is not None:
        part, divisor = part * share.sqrt()[:, None, None, None], count
    if groups == 1:
        flat = part.reshape(rows * count, size)
        return flat.T @ flat / divisor
    flat = part.transpose(0, 1).reshape(groups, rows * count, size)
    return flat.mT @ flat / divisor
