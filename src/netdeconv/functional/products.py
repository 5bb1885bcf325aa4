"""The product of weights with a root, with less work where the root leaves some taps of the kernel to themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["features_mixed", "times_root"]

_WORTH_LOOKING = 256  # rows of weights, below which the product costs no more than the look


def times_root(rows: Tensor, root: Tensor, taps: int) -> Tensor:
    """``rows @ root``, up to rounding, for finite rows and a symmetric root.

    On a map smaller than the kernel some taps only ever see padding in the patches that were looked at: a 3x3 kernel
    on a 2x2 map, looked at from its corner, has 5 of 9. They do not vary, so that the root has nothing but its
    diagonal there, and the product is that of the other features alone: a fifth of the work in the example.

    Shapes: rows ``(groups, rows, features)``, root ``(features, features)`` or ``(groups, features, features)``,
    features in the order (channel, tap) -> as rows.
    """
    mixed = features_mixed(root, taps) if rows.shape[-2] >= _WORTH_LOOKING else None
    if mixed is None:
        return rows @ root
    core = root.index_select(0, mixed).index_select(1, mixed)
    product = rows * root.diagonal()
    return product.index_copy_(-1, mixed, rows.index_select(-1, mixed) @ core)


def features_mixed(root: Tensor, taps: int) -> Tensor | None:
    """Indices of the features that a root mixes; ``None`` where there is nothing to gain, or no looking.

    To look at a root's values means to wait for a GPU; compilers and tracers cannot; and a root with a gradient has one
    at its zeros, too.
    """
    plain = type(root) in (torch.Tensor, torch.nn.Parameter) and root.device.type == "cpu" and not root.requires_grad
    if taps == 1 or root.dim() > 2 or not plain or torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return None
    channels = root.shape[0] // taps
    few = [root[channel * taps : (channel + 1) * taps] for channel in (0, channels // 2, channels - 1)]
    if not (torch.stack(few).count_nonzero(-1) <= 1).all(0).any():
        return None  # nearly always there is no more to see
    off_diagonal = (root != 0).fill_diagonal_(False)
    mixing = off_diagonal.reshape(channels, taps, -1).any(-1).any(0).nonzero().flatten()
    if len(mixing) > 0.75 * taps:
        return None
    start = torch.arange(channels, device=root.device).unsqueeze(1) * taps
    return (start + mixing).flatten()
