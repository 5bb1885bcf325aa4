"""The refresh of the roots: what a batch and the memory give, in steps or as one operator for compilers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from netdeconv.config import WhiteningConfig
from netdeconv.functional.constants import without_caching
from netdeconv.nn.averages import blended, blended_root, update_weight
from netdeconv.nn.estimator import Estimator

__all__ = ["Counters", "all_finite", "averaged_roots", "opaque_refresh"]


class Counters(NamedTuple):
    """What a whitening counts, 0-dim tensors; see :class:`netdeconv.nn.Whitening`."""

    num_steps: Tensor
    last_update: Tensor
    num_updates: Tensor


def all_finite(values: Sequence[Tensor]) -> Tensor:
    """Whether there is no NaN and nothing infinite among them; isfinite takes torch far longer on a CPU."""
    largest = [value.detach().abs().amax() for value in values]
    return (largest[0] if len(largest) == 1 else torch.stack(largest).amax()) < math.inf


def averaged_roots(
    config: WhiteningConfig, roots: Sequence[Tensor], running: Sequence[Tensor], counters: Counters
) -> list[Tensor]:
    """The running roots with those of this step, without gradient, blended in.

    Args:
        config: all settings.
        roots: of this step.
        running: what is remembered.
        counters: as they are before this step.
    """
    num_steps, last_update, num_updates = counters
    waited, updates, steps = num_steps + 1 - last_update, num_updates + 1, num_steps + 1
    share = update_weight(config, roots[0].dtype, waited, updates, steps, num_updates)
    blend = blended_root if config.debias else blended
    return [blend(old, root, share) for old, root in zip(running, roots, strict=True)]


def opaque_refresh(
    estimator: Estimator, x: Tensor, running: Sequence[Tensor], counters: Counters, finite: Tensor
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The roots of x and the running ones with them blended in, as one operator that a compiler does not look into.

    A hundred small operators for every layer would take it minutes, and they are run in one step out of many. In a
    CUDA graph the operator is recorded like any other.

    Args:
        estimator: what is computed; without gradient.
        x: input of the layer, ``(N, C, *spatial)``.
        running, counters: see :func:`averaged_roots`.
        finite: whether the mean is.

    Returns:
        Roots, running roots, and whether all is finite; where it is not, both are the running ones.
    """
    *found, finite = torch.ops.netdeconv.refresh(x, list(running), *counters, finite, estimator.serialized)
    return found[: len(running)], found[len(running) :], finite


def _refresh(
    x: Tensor,
    running: list[Tensor],
    num_steps: Tensor,
    last_update: Tensor,
    num_updates: Tensor,
    finite: Tensor,
    serialized: str,
) -> list[Tensor]:
    estimator = Estimator.deserialize(serialized)
    with without_caching():
        covs = estimator.sample_moments(x, num_updates, factored=True).covs
        found = [estimator.root_of(cov) for cov in covs]
    finite = finite & all_finite(found)
    roots = [torch.where(finite, root, old.to(root.dtype)) for root, old in zip(found, running, strict=True)]
    averages = averaged_roots(estimator.config, roots, running, Counters(num_steps, last_update, num_updates))
    return [*roots, *averages, finite]


def _shapes(x: Tensor, running: list[Tensor], *_: Any) -> list[Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return [*(torch.empty_like(old, dtype=dtype) for old in (*running, *running)), x.new_empty((), dtype=torch.bool)]


_op = torch.library.custom_op("netdeconv::refresh", _refresh, mutates_args=())
_op.register_fake(_shapes)
