"""The refresh of the roots: what a batch and the memory give, in steps or as one operator for compilers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from netdeconv.config import WhiteningConfig
from netdeconv.functional import Moments, varies
from netdeconv.functional.tracing import without_caching
from netdeconv.nn.averages import Count, blended, blended_root, refresh_weight, update_weight
from netdeconv.nn.estimator import Estimator

__all__ = ["Counters", "Refreshed", "all_finite", "averaged_roots", "chosen", "opaque_refresh", "refreshed"]


class Counters(NamedTuple):
    """What a whitening counts: 0-dim tensors or, where they have been looked at, numbers; see
    :class:`netdeconv.nn.Whitening`."""

    num_steps: Count
    last_update: Count
    num_updates: Count


class Refreshed(NamedTuple):
    """What a refresh gives: the roots of this step, the averages with this step blended in, and whether it counts."""

    roots: list[Tensor]
    averages: list[Tensor]
    counts: Tensor | bool


def all_finite(values: Sequence[Tensor], *, look: bool = False) -> Tensor | bool:
    """Whether there is no NaN and nothing infinite among them, nor a sum out of range; a plain bool with ``look``."""
    if look:
        return all(math.isfinite(value.detach().sum()) for value in values)
    largest = [value.detach().abs().amax() for value in values]  # isfinite takes torch far longer on a CPU
    return (largest[0] if len(largest) == 1 else torch.stack(largest).amax()) < math.inf


def chosen(counts: Tensor | bool, new: Tensor, old: Tensor) -> Tensor:
    """What is new where it counts, and otherwise a copy of what is old."""
    if isinstance(counts, bool):
        return new if counts else old.to(new.dtype, copy=True)
    return torch.where(counts, new, old.to(new.dtype))


def _usable(estimator: Estimator, moments: Moments) -> Tensor | bool:
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
    counts: Tensor | bool,
) -> Refreshed:
    """The roots of this step, from what a batch says and what is remembered.

    Args:
        estimator: what is computed.
        moments: of a sample of the batch.
        running: the running roots, which stand in for what cannot be used.
        averages: what is averaged, running covariances or running roots.
        counters: as they are before this step.
        counts: whether the rest of what the batch says can be used; a plain bool where that may be looked at, and then
            the result is one, too.
    """
    config = estimator.config
    by_covariance = config.average == "covariance"
    look, covs = isinstance(counts, bool), list(moments.covs)
    counts = counts & _usable(estimator, moments)
    if by_covariance:
        share = refresh_weight(config, covs[0].dtype, counters.num_updates)
        covs = [blended(old, cov, share) for old, cov in zip(averages, covs, strict=True)]
    found = [estimator.root_of(cov) for cov in covs]
    counts = counts & all_finite(found, look=look)
    counts = bool(counts) if look else counts
    roots = [chosen(counts, root, old) for root, old in zip(found, running, strict=True)]
    if by_covariance:
        kept = [chosen(counts, cov, old) for cov, old in zip(covs, averages, strict=True)]
        return Refreshed(roots, kept, counts)
    return Refreshed(roots, averaged_roots(config, roots, averages, counters), counts)


def averaged_roots(
    config: WhiteningConfig, roots: Sequence[Tensor], averages: Sequence[Tensor], counters: Counters
) -> list[Tensor]:
    """The running roots with those of this step blended in."""
    waited, updates = counters.num_steps + 1 - counters.last_update, counters.num_updates + 1
    share = update_weight(config, roots[0].dtype, waited, updates, counters.num_steps + 1, counters.num_updates)
    blend = blended_root if config.debias else blended
    return [blend(old, root.detach(), share) for old, root in zip(averages, roots, strict=True)]


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
        roots, new, counted = refreshed(estimator, moments, running, averages, counters, counts)
    assert isinstance(counted, Tensor)
    return [*roots, *new, counted]


def _shapes(x: Tensor, scale: Tensor | None, running: list[Tensor], *_: Any) -> list[Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return [*(torch.empty_like(old, dtype=dtype) for old in (*running, *running)), x.new_empty((), dtype=torch.bool)]


_op = torch.library.custom_op("netdeconv::refresh", _refresh, mutates_args=())
_op.register_fake(_shapes)
