"""The refresh of the roots: what a batch and the memory give, in steps or as one operator for compilers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from netdeconv.functional import Moments
from netdeconv.functional.constants import without_caching
from netdeconv.nn.averages import blended, blended_root, refresh_weight, update_weight
from netdeconv.nn.estimator import Estimator

__all__ = ["Counters", "Refreshed", "all_finite", "opaque_refresh", "refreshed", "usable", "varies"]

_ROUNDING = 64  # in units of the last place: means of a million equal numbers were seen to be off by 11


class Counters(NamedTuple):
    """What a whitening counts, 0-dim tensors; see :class:`netdeconv.nn.Whitening`."""

    num_steps: Tensor
    last_update: Tensor
    num_updates: Tensor


class Refreshed(NamedTuple):
    """What a refresh gives: the roots of this step, the averages with this step blended in, and whether it counts."""

    roots: list[Tensor]
    averages: list[Tensor]
    counts: Tensor


def all_finite(values: Sequence[Tensor]) -> Tensor:
    """Whether there is no NaN and nothing infinite among them; isfinite takes torch far longer on a CPU."""
    largest = [value.detach().abs().amax() for value in values]
    return (largest[0] if len(largest) == 1 else torch.stack(largest).amax()) < math.inf


def varies(var: Tensor, square_of_mean: Tensor) -> Tensor:
    """Whether any of these variances is more than what rounding makes of a constant."""
    tolerance = (_ROUNDING * torch.finfo(var.dtype).eps) ** 2
    return (var.detach() > tolerance * square_of_mean.detach()).any()


def usable(estimator: Estimator, moments: Moments) -> Tensor | bool:
    """Whether there is a covariance to take a root of: a single row or a constant batch has none.

    As published, a root is taken all the same, and multiplies by one over the root of eps.
    """
    blocks = estimator.blocks
    if not (estimator.config.debias and moments.covs):
        return True
    grouped = moments.mean.reshape(blocks.groups, -1)
    means = [grouped.unsqueeze(1)] if blocks.pool_mean else blocks.split(grouped)
    each = [
        varies(_variances(cov), mean.square().mean(1).reshape(*cov.shape[:-2], -1))
        for cov, mean in zip(moments.covs, means, strict=True)
    ]
    return torch.stack(each).any()


def _variances(cov: Tensor) -> Tensor:
    """The diagonal of a covariance, or of the one that a factor stands for."""
    rows, features = cov.shape[-2:]
    return cov.square().sum(-2) if rows < features else cov.flatten(-2)[..., :: features + 1]


def refreshed(
    estimator: Estimator,
    moments: Moments,
    running: Sequence[Tensor],
    averages: Sequence[Tensor],
    counters: Counters,
    counts: Tensor,
) -> Refreshed:
    """The roots of this step, from what a batch says and what is remembered.

    Args:
        estimator: what is computed.
        moments: of a sample of the batch.
        running: the running roots, which stand in for what cannot be used.
        averages: what is averaged, running covariances or running roots.
        counters: as they are before this step.
        counts: whether the rest of what the batch says can be used.
    """
    config = estimator.config
    by_covariance = config.average == "covariance"
    covs = list(moments.covs)
    counts = counts & usable(estimator, moments)
    if by_covariance:
        share = refresh_weight(config, covs[0].dtype, counters.num_updates)
        covs = [blended(old, cov, share) for old, cov in zip(averages, covs, strict=True)]
    found = [estimator.root_of(cov) for cov in covs]
    counts = counts & all_finite(found)
    roots = [torch.where(counts, root, old.to(root.dtype)) for root, old in zip(found, running, strict=True)]
    if by_covariance:
        kept = [torch.where(counts, cov, old.to(cov.dtype)) for cov, old in zip(covs, averages, strict=True)]
        return Refreshed(roots, kept, counts)
    detached = [root.detach() for root in roots]
    waited, updates = counters.num_steps + 1 - counters.last_update, counters.num_updates + 1
    share = update_weight(config, roots[0].dtype, waited, updates, counters.num_steps + 1, counters.num_updates)
    blend = blended_root if config.debias else blended
    return Refreshed(roots, [blend(old, root, share) for old, root in zip(averages, detached, strict=True)], counts)


def opaque_refresh(
    estimator: Estimator,
    x: Tensor,
    scale: Tensor | None,
    running: Sequence[Tensor],
    averages: Sequence[Tensor],
    counters: Counters,
    counts: Tensor,
) -> Refreshed:
    """:func:`refreshed` of a sample of x, as one operator that a compiler does not look into; without gradient.

    A hundred small operators for every layer would take it minutes, and they are run in one step out of many. In a
    CUDA graph the operator is recorded like any other.
    """
    given = (x, scale, list(running), list(averages), *counters, counts)
    *found, counts = torch.ops.netdeconv.refresh(*given, estimator.serialized)
    return Refreshed(found[: len(running)], found[len(running) :], counts)


def _refresh(
    x: Tensor,
    scale: Tensor | None,
    running: list[Tensor],
    averages: list[Tensor],
    num_steps: Tensor,
    last_update: Tensor,
    num_updates: Tensor,
    counts: Tensor,
    serialized: str,
) -> list[Tensor]:
    estimator = Estimator.deserialize(serialized)
    with without_caching():
        moments = estimator.sample_moments(x, num_updates, scale, factored=True)
        counters = Counters(num_steps, last_update, num_updates)
        roots, new, counts = refreshed(estimator, moments, running, averages, counters, counts)
    return [*roots, *new, counts]


def _shapes(x: Tensor, scale: Tensor | None, running: list[Tensor], *_: Any) -> list[Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return [*(torch.empty_like(old, dtype=dtype) for old in (*running, *running)), x.new_empty((), dtype=torch.bool)]


_op = torch.library.custom_op("netdeconv::refresh", _refresh, mutates_args=())
_op.register_fake(_shapes)
