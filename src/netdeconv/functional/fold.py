"""Folding mean and root into the layer's own weight and bias: whitening at the price of a plain layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from netdeconv.functional.blocks import Blocks

__all__ = ["fold"]


def fold(
    weight: Tensor, bias: Tensor | None, mean: Tensor, roots: Sequence[Tensor], blocks: Blocks
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the plain layer that whitens its input and then applies ``weight`` and ``bias``.

    ``(x - mean) D w + b = x (D w) + (b - mean D w)``: the first form moves every activation, the second none.

    Shapes: weight ``(out, channels / groups, *kernel)``, bias ``(out,)`` or ``None``, mean
    ``blocks.mean_shape``, roots ``blocks.root_shapes`` -> the same shapes as weight and ``(out,)``, in the
    weight's dtype. Computed in float32 at least, also under autocast.

    Source: Ye et al. 2020, section 3.4 (implicit deconvolution).
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(weight.device.type, enabled=False):
        grouped = weight.to(dtype).reshape(blocks.groups, -1, blocks.group_features)
        folded = blocks.join(
            [_times_root(part, root.to(dtype)) for part, root in zip(blocks.split(grouped), roots, strict=True)]
        )
        shift = torch.einsum("goi,gi->go", folded, blocks.spread_mean(mean.to(dtype))).flatten()
        shifted = -shift if bias is None else bias.to(dtype) - shift
    return folded.reshape(weight.shape).to(weight.dtype), shifted.to(weight.dtype)


def _times_root(part: Tensor, root: Tensor) -> Tensor:
    """(groups, out, blocks, features) times the symmetric (groups, features, features) root."""
    if root.dim() == 2:
        return part @ root
    groups, out, count, size = part.shape
    return (part.reshape(groups, out * count, size) @ root).reshape(part.shape)
