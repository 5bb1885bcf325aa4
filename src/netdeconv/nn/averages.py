"""Running averages: of means, and of inverse roots, whose gains are averaged as variances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from netdeconv.config import WhiteningConfig
from netdeconv.functional.precision import at_least_float32
from netdeconv.functional.tracing import batched

__all__ = ["Count", "blend", "blended", "blended_root", "refresh_weight", "update_share", "update_weight"]

Count = Tensor | int


def update_share(config: WhiteningConfig, waited: Any, updates: Any, steps: Any) -> Any:
    """Share in the running values of what waited so long, the last of ``updates`` in ``steps`` training steps.

    Numbers or tensors; see :class:`netdeconv.nn.Whitening` for what they mean.
    """
    momentum = config.momentum
    if momentum is None:
        return waited / steps
    new = 1 - (1 - momentum) ** ((waited + 1) / 2)
    if not config.debias:
        return new
    seen = 1 - (1 - momentum) ** ((steps + updates) / 2)
    least = torch.finfo(torch.float32).tiny  # a momentum near zero sees nothing
    return new / (seen.clamp(min=least) if isinstance(seen, Tensor) else max(seen, least))


def update_weight(
    config: WhiteningConfig, dtype: torch.dtype, waited: Count, updates: Count, steps: Count, remembered: Count
) -> Tensor | float:
    """:func:`update_share` by counters; with nothing remembered all of it, whatever was left out before.

    Counters may be tensors on a device, or Python's numbers, which cost no operator.
    """
    biased = config.momentum is not None and not config.debias
    if isinstance(remembered, int):
        share: float = update_share(config, waited, updates, steps)
        return share if biased or remembered else 1.0
    dtype = at_least_float32(dtype)
    assert isinstance(waited, Tensor) and isinstance(updates, Tensor) and isinstance(steps, Tensor)
    found: Tensor = update_share(config, waited.to(dtype), updates.to(dtype), steps.to(dtype))
    return found if biased else torch.where(remembered > 0, found, torch.ones_like(found))


def refresh_weight(config: WhiteningConfig, dtype: torch.dtype, updates: Count) -> Tensor | float:
    """Share of a new covariance in the running one after so many refreshes: every refresh counts the same."""
    momentum = config.momentum
    if isinstance(updates, int):
        if momentum is None or (config.debias and not updates):
            return 1 / (updates + 1)
        seen = 1 - (1 - momentum) ** (updates + 1) if config.debias else 1.0
        return momentum / max(seen, torch.finfo(torch.float32).tiny)
    count = (updates + 1).to(at_least_float32(dtype))
    if momentum is None:
        return 1 / count
    share = torch.full_like(count, momentum)
    if config.debias:  # a momentum near zero keeps the first one
        share = share / (1 - (1 - share) ** count).clamp(min=torch.finfo(count.dtype).tiny)
    return torch.where(updates > 0, share, torch.ones_like(share)) if config.debias else share


def blend(running: Tensor, new: Tensor, weight: Tensor | float) -> None:
    """:func:`blended`, in place."""
    if batched(running):  # vmap has no rule for lerp
        running.add_((new.to(running.dtype) - running) * weight)
    elif running.dtype == new.dtype:
        running.lerp_(new, weight.to(new.dtype) if isinstance(weight, Tensor) else weight)
    else:
        running.copy_(blended(running, new, weight))


def blended(running: Tensor, new: Tensor, weight: Tensor | float) -> Tensor:
    """A running value of which this share is replaced by a new one; in the new one's dtype."""
    return torch.lerp(running.to(new.dtype), new, weight.to(new.dtype) if isinstance(weight, Tensor) else weight)


def blended_root(running: Tensor, new: Tensor, weight: Tensor | float) -> Tensor:
    """:func:`blended` for ``1 / gain**2`` of every feature, and for a root of which all gains are 1.

    The gain of a feature is its entry on the diagonal. Where rounding has made one negative there is nothing to divide
    by, and it is blended as it is.
    """
    if isinstance(weight, float) and weight >= 1:
        return new
    old, weight = running.to(new.dtype), weight.to(new.dtype) if isinstance(weight, Tensor) else weight
    before, now = _gains(old), _gains(new)
    largest = torch.finfo(new.dtype).max ** 0.5  # its square stays finite
    ratio = torch.where((before > 0) & (now > 0), before / now, torch.ones_like(now)).clamp(max=largest)
    gain = torch.lerp(torch.ones_like(ratio), ratio.square(), weight).rsqrt()  # of the average, over the old one
    average = _scaled(torch.lerp(old, _scaled(new, ratio), weight), gain)
    if isinstance(weight, float):
        return average
    return torch.where(weight < 1, average, new)  # the first one stays what it is, to the last bit


def _gains(root: Tensor) -> Tensor:
    """The diagonal; torch.diagonal itself makes the compiler of torch 2.14 warn."""
    return root.flatten(-2)[..., :: root.shape[-1] + 1]


def _scaled(root: Tensor, gains: Tensor) -> Tensor:
    """A root with these times the gains."""
    each = gains.sqrt()
    return root * each.unsqueeze(-1) * each.unsqueeze(-2)
