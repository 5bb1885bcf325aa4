"""The inverse of folding: weights of a whitened layer that equals a given plain one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from netdeconv.functional.precision import exact

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from netdeconv.functional.blocks import Blocks

__all__ = ["unfold"]


def unfold(
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    roots: Sequence[Tensor],
    blocks: Blocks,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weight and bias that :func:`netdeconv.functional.fold` makes the given ones of; in float64.

    ``w = D^-1 S^-1 w'``, ``b = b' + mean w'``, S the diagonal of ``scale``. Accurate as the roots' condition allows.

    Shapes: as in :func:`netdeconv.functional.fold`.
    """
    grouped = exact(weight).reshape(blocks.groups, -1, blocks.group_features)
    shift = torch.einsum("goi,gi->go", grouped, blocks.spread_mean(exact(mean))).flatten()
    if scale is not None:
        grouped = grouped / blocks.of_channels(exact(scale)).unsqueeze(1)
    parts = []
    for part, root in zip(blocks.split(grouped), roots, strict=True):
        groups, out, count, size = part.shape
        flat = part.reshape(groups, out * count, size)
        solved = torch.linalg.solve(exact(root).expand(groups, size, size), flat, left=False)
        parts.append(solved.reshape(part.shape))
    return blocks.join(parts).reshape(weight.shape), exact(bias) + shift
