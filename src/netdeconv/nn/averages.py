"""Running averages, in place: of means, and of inverse roots, whose gains are averaged as variances."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["blend", "blend_root"]


def blend(running: Tensor, new: Tensor, weight: Tensor) -> None:
    """Replace this share of a running value, in place, by a new one; computed in the new one's dtype."""
    running.copy_(torch.lerp(running.to(new.dtype), new, weight.to(new.dtype)))


def blend_root(running: Tensor, new: Tensor, weight: Tensor) -> None:
    """:func:`blend` for ``1 / gain**2`` of every feature, and for a root of which all gains are 1.

    The gain of a feature is its entry on the diagonal. Where rounding has made one negative there is nothing to divide
    by, and it is blended as it is.
    """
    old, weight = running.to(new.dtype), weight.to(new.dtype)
    before, now = _gains(old), _gains(new)
    largest = torch.finfo(new.dtype).max ** 0.5  # its square stays finite
    ratio = torch.where((before > 0) & (now > 0), before / now, torch.ones_like(now)).clamp(max=largest)
    gain = torch.lerp(torch.ones_like(ratio), ratio.square(), weight).rsqrt()  # of the average, over the old one
    blended = _scaled(torch.lerp(old, _scaled(new, ratio), weight), gain)
    running.copy_(torch.where(weight < 1, blended, new))  # the first one stays what it is, to the last bit


def _gains(root: Tensor) -> Tensor:
    """The diagonal; torch.diagonal itself makes the compiler of torch 2.14 warn."""
    return root.flatten(-2)[..., :: root.shape[-1] + 1]


def _scaled(root: Tensor, gains: Tensor) -> Tensor:
    """A root with these times the gains."""
    each = gains.sqrt()
    return root * each.unsqueeze(-1) * each.unsqueeze(-2)
