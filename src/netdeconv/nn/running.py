"""What a whitening remembers: its buffers, how they are averaged, counted, saved and loaded."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from netdeconv.config import WhiteningConfig
from netdeconv.errors import NonFiniteWarning, StatisticsWarning
from netdeconv.functional import Blocks, Slope, Window
from netdeconv.functional.tracing import readable, traced
from netdeconv.nn.averages import blend, update_share, update_weight
from netdeconv.nn.estimator import Estimator
from netdeconv.nn.refresh import Counters, chosen
from netdeconv.nn.schedule import Clock

__all__ = ["Batch", "RunningStatistics", "Statistics", "kept"]

_SETTLED = 1e-6  # the weight that the time before still has in averages that are set


class Statistics(NamedTuple):
    """What a layer folds into its weights: ``mean`` as ``blocks.mean_shape``, ``roots`` as ``blocks.root_shapes``, and
    ``scale``, what every channel is multiplied by, ``None`` for one; and, where that was asked for, its ``slope``."""

    mean: Tensor
    roots: tuple[Tensor, ...]
    scale: Tensor | None
    slope: Slope | None = None


class Batch(NamedTuple):
    """What a batch says of mean and variance, how its scale depends on it, and whether it says anything.

    That is a plain bool where it has been looked at, which on a CPU does not mean to wait.
    """

    mean: Tensor
    var: Tensor | None
    scale: Tensor | None
    slope: Slope | None
    counts: Tensor | bool


class RunningStatistics(nn.Module):
    """The memory of :class:`netdeconv.nn.Whitening`, which says what the buffers are.

    Args:
        estimator: what is computed, which the buffers are made for.
        label: what messages call this place.
    """

    running_mean: Tensor
    running_var: Tensor | None
    running_root: Tensor
    num_updates: Tensor
    num_steps: Tensor
    last_update: Tensor
    num_skipped: Tensor

    def __init__(
        self,
        estimator: Estimator,
        label: str,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.label, self.estimator = label, estimator
        assert self.config.update_every is not None
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_buffer("running_mean", torch.empty(self.blocks.mean_shape, **place))
        self.register_buffer("running_var", torch.empty(self.blocks.channels, **place) if self.config.scale else None)
        self._kinds: tuple[str, ...] = ("running_root",)
        if self.config.average == "covariance":
            self._kinds += ("running_cov",)
        elif self.config.update_every > 1:
            self._kinds += ("last_root",)
        for kind in self._kinds:
            for name, shape in zip(self._names(kind), self.blocks.root_shapes, strict=True):
                self.register_buffer(name, torch.empty(shape, **place))
        for name in ("num_updates", "num_steps", "last_update", "num_skipped"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=device))
        self._clock = Clock(self.config.update_every)
        self._clock.serve(self)
        self._skipped = 0
        self._looked_at = False

    def _names(self, kind: str) -> tuple[str, ...]:
        return (kind, f"{kind}_rest")[: len(self.blocks.parts)]

    def _matrices(self, kind: str) -> tuple[Tensor, ...]:
        """The buffers of this kind, one for every part of ``blocks``; none where there is no such kind."""
        return tuple(getattr(self, name) for name in self._names(kind)) if kind in self._kinds else ()

    def _last_roots(self) -> tuple[Tensor, ...]:
        """The roots of the last refresh: those of an averaged covariance are the running ones."""
        return self._matrices("last_root") or self._matrices("running_root")

    def _averages(self) -> tuple[Tensor, ...]:
        """What is averaged over the refreshes."""
        return self._matrices("running_cov") or self._matrices("running_root")

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy or a pickle."""
        super().__setstate__(state)
        self._clock.serve(self)

    @property
    def clock(self) -> Clock:
        """When the next refresh is due, as the buffers say."""
        self._clock.follow(self.num_steps, self.num_updates)
        return self._clock

    @property
    def config(self) -> WhiteningConfig:
        """All settings, with nothing left to choose; they cannot be changed: buffers and schedule are made for them."""
        return self.estimator.config

    @property
    def blocks(self) -> Blocks:
        """How the patches are cut."""
        return self.estimator.blocks

    @property
    def window(self) -> Window:
        """What the layer looks at."""
        return self.estimator.window

    def reset_statistics(self) -> None:
        """Forget everything: zero mean, variance one, identity roots and covariances, all counters zero."""
        self.running_mean.zero_()
        if self.running_var is not None:
            self.running_var.fill_(1)
        for kind in self._kinds:
            for matrix in () if self.running_mean.is_meta else self._matrices(kind):
                matrix.copy_(_identity_like(matrix))
        for counter in (self.num_updates, self.num_steps, self.last_update, self.num_skipped):
            counter.zero_()
        self._clock.set(0)
        self._skipped, self._looked_at = 0, False

    @torch.no_grad()
    def set_statistics(
        self,
        mean: Tensor,
        roots: Sequence[Tensor],
        *,
        covs: Sequence[Tensor] = (),
        var: Tensor | None = None,
        updates: int = 1,
    ) -> None:
        """Make these the running statistics and those of the last refresh, as if training had seen no others for long.

        The schedule is past its dense warm-up then, and later refreshes blend into these values by the momentum.

        Shapes: those of the buffers, but for leading ones.

        Args:
            mean, roots: see :class:`Statistics`.
            covs: of scaled channels, one for every root, for ``config.average == "covariance"``.
            var: of every channel, for ``config.scale``.
            updates: refreshes that they are from.
        """
        self.running_mean.copy_(mean.reshape(self.running_mean.shape))
        if self.running_var is not None and var is not None:
            self.running_var.copy_(var)
        for kind, matrices in (("running_root", roots), ("last_root", roots), ("running_cov", covs)):
            for buffer, matrix in zip(self._matrices(kind), matrices, strict=False):
                buffer.copy_(matrix.reshape(buffer.shape))
        assert self.config.update_every is not None
        steps = 16 * self.config.update_every  # a multiple of the interval, so that the next step refreshes
        if self.config.momentum is not None and 0 < self.config.momentum < 1:
            needed = 2 * math.log(_SETTLED) / math.log1p(-self.config.momentum)  # kept roots count for half of them
            steps *= math.ceil(needed / steps)
        self.num_updates.fill_(max(1, updates))
        self.num_steps.fill_(steps)
        self.last_update.fill_(steps)
        self.num_skipped.zero_()
        self.train(self.training)  # lets it look at the counters

    def reset_parameters(self) -> None:
        """:meth:`reset_statistics`, by the name that is called after ``to_empty``."""
        self.reset_statistics()

    def _running(self, roots: Sequence[Tensor]) -> Statistics:
        """The running mean and scale with kept roots."""
        scale = None if self.running_var is None else self.estimator.scale_of(self.running_var)
        return Statistics(kept(self.running_mean), tuple(map(kept, roots)), scale)

    def _remember(self, batch: Batch, due: bool) -> None:
        """Blend mean and variance into the running ones; where they do not count, they are those already."""
        mean, var, *_, counts = batch
        if due or traced() or not self._clock.updated:
            counters = self._counters(look=isinstance(counts, bool))
            steps, one = counters.num_steps + 1, counters.num_steps * 0 + 1
            part = update_weight(self.config, mean.dtype, one, steps, steps, counters.num_updates)
        else:  # nobody has to ask the device
            part = update_share(self.config, 1, self._clock.steps + 1, self._clock.steps + 1)
        blend(self.running_mean, constant(mean), part)
        if self.running_var is not None and var is not None:
            most = torch.finfo(self.running_var.dtype).max  # of half precision, where the input's square may be more
            blend(self.running_var, constant(var).clamp(max=most) if most < 1e30 else constant(var), part)
        if isinstance(counts, Tensor):  # to look would mean to wait
            self.num_skipped.add_(~counts)
        elif not counts:
            self.num_skipped.add_(1)
            self._report_skipped()

    def _remember_roots(self, roots: Sequence[Tensor], averages: Sequence[Tensor], counts: Tensor | bool) -> None:
        """Keep the averages, and the roots of this step as the last ones, where they count."""
        if counts is False:
            return
        for running, average in zip(self._averages(), averages, strict=True):
            running.copy_(average)
        if "running_cov" in self._kinds or "last_root" in self._kinds:
            for last, root in zip(self._last_roots(), roots, strict=True):
                last.copy_(chosen(counts, root.detach().to(last.dtype), last))
        self.last_update.copy_(chosen(counts, self.num_steps + 1, self.last_update))
        self.num_updates.add_(counts)

    def _counters(self, *, look: bool = False) -> Counters:
        """The counters, as numbers with ``look``."""
        found = self.num_steps, self.last_update, self.num_updates
        return Counters(*map(int, found)) if look else Counters(*found)

    def _warn_of_identity(self) -> None:
        """Say once that nothing has been gathered: by the values, as not everybody who writes them counts."""
        if self._looked_at or traced() or not readable(self.running_mean):
            return
        self._looked_at = True
        scaled = self.running_var is not None and bool((self.running_var != 1).any())
        if self.num_updates > 0 or scaled or self.running_mean.any() or not self._matrices_are_identity():
            return
        warnings.warn(
            "netdeconv: expected whitening statistics from training, got none so far: whitened layers act as the plain "
            "ones. Run some batches in training mode (model.train()), load a state dict, or run "
            "netdeconv.calibrate(model, data).",
            StatisticsWarning,
            stacklevel=2,
        )

    def _matrices_are_identity(self) -> bool:
        return all(torch.equal(root, _identity_like(root)) for root in self._matrices("running_root"))

    def _report_skipped(self) -> None:
        skipped = int(self.num_skipped)
        self._skipped = min(self._skipped, skipped)  # somebody may have reset the counter
        if skipped and skipped >= 2 * self._skipped:  # at the 1st, 2nd, 4th, ..., as a diverged run skips every step
            warnings.warn(
                f"{self.label}: expected finite input that varies, got NaN, infinite or constant values, or a single "
                f"row, in {skipped - self._skipped} step(s), {skipped} so far. The running statistics were left as "
                "they were; look for the batch, a too large learning rate, or an overflow in half precision.",
                NonFiniteWarning,
                stacklevel=2,
            )
            self._skipped = skipped

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        problem = self._why_not(state_dict, prefix)
        if problem is not None:
            error_msgs.append(problem)
            return
        # A layer that refreshed at every step has saved no last root: the running one is the nearest to it.
        for last, running in zip(self._names("last_root"), self._names("running_root"), strict=True):
            if "last_root" not in self._kinds:
                state_dict.pop(prefix + last, None)
            elif prefix + last not in state_dict and prefix + running in state_dict:
                state_dict[prefix + last] = state_dict[prefix + running]
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._after_loading()

    def _after_loading(self) -> None:
        if not self.num_steps.is_meta:
            self._clock.follow(self.num_steps, self.num_updates, look=True)
            self._skipped, self._looked_at = int(self.num_skipped), False

    def _why_not(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """Why statistics that were saved under other settings cannot be these; ``None`` where they can."""
        if prefix + "running_root" not in state_dict:
            return None  # torch says what is missing
        average = "covariance" if prefix + "running_cov" in state_dict else "root"
        theirs = {"scale": prefix + "running_var" in state_dict, "average": average}
        ours = {name: getattr(self.config, name) for name in theirs}
        if theirs == ours:
            return None
        expected, got = (", ".join(f"{name}={value!r}" for name, value in each.items()) for each in (ours, theirs))
        return (
            f"{self.label}: expected statistics of {expected} in {prefix}*, got those of {got}. Build the layer with "
            f"WhiteningConfig({got}), or drop these entries and run netdeconv.calibrate(model, data)."
        )


def _identity_like(matrices: Tensor) -> Tensor:
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return eye.expand_as(matrices)


def constant(value: Tensor) -> Tensor:
    """The value without its gradient, if it has one."""
    return value.detach() if value.requires_grad or traced() else value


def kept(value: Tensor) -> Tensor:
    """A buffer to compute with: a copy where a gradient is recorded, as the next step changes the buffer in place."""
    return value.clone() if torch.is_grad_enabled() or torch.jit.is_tracing() else value
