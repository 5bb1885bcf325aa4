"""The whitening of one layer's input: what a step is whitened by, and when the statistics are refreshed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from netdeconv.config import WhiteningConfig
from netdeconv.errors import StatisticsError
from netdeconv.functional import Moments, Window
from netdeconv.functional.onlookers import traced
from netdeconv.nn.estimator import Estimator
from netdeconv.nn.refresh import all_finite, opaque_refresh, refreshed, usable, varies
from netdeconv.nn.running import Batch, RunningStatistics, Statistics, kept
from netdeconv.nn.sync import Share, check_same_mode, distributed, joined_moments, share_of_channels

__all__ = ["Statistics", "Whitening"]


class Whitening(RunningStatistics):
    """Mean, scale and inverse root of the covariance of the patches that a layer looks at.

    ``forward(x)`` returns what the layer folds into its weights. In training, mean and scale are those of the batch, at
    every step: they move fast and are cheap. The gradient through the scale is what keeps activations from growing. The
    root is expensive, and is computed on refresh steps only (see ``config.update_every``), from the covariance of the
    scaled channels, averaged over the refreshes; other steps use the last one. In evaluation, and when ``frozen``, all
    are the running values. Linear layers differ, see :data:`netdeconv.config.KINDS`.

    Running values are averages over training steps: of mean and variance with the weight ``momentum`` at every step, of
    an averaged covariance at every refresh, of averaged roots with ``1 - (1 - momentum)**((k + 1) / 2)`` after k steps.
    With ``debias`` the weights are divided by their sum, as Adam does, and of averaged roots the gain of every
    feature, the diagonal, is averaged as ``1 / gain**2``, apart from the rest, as batch normalisation averages
    variances: an average of roots is ruled by the smallest inputs that were seen. A batch that has no statistics
    (NaN, infinite values, a single row, one constant) changes nothing and is whitened by the running values, and a
    :class:`NonFiniteWarning` says so: at once on a CPU, otherwise when the module next changes between training and
    evaluation. A 1x1 convolution of maps of one pixel, as behind a global pooling, sees one row per image, too few for
    a covariance: it stays the plain layer (``forward`` returns ``None``, and the running values stay the identity).

    Args:
        channels: channels of the layer's input.
        window: what the layer looks at; an empty ``Window()`` for a linear layer.
        groups: convolution groups.
        config: all settings, ``None`` for the defaults.
        kind: the kind of layer, one of :data:`netdeconv.config.KINDS`; ``None`` for that of window and groups.
        label: what error messages call this place.

    Attributes:
        frozen: no refresh while true, see :func:`netdeconv.freeze`.
        process_group: processes to gather statistics from when ``config.sync``; ``None`` for all.

    Buffers: ``running_mean``; ``running_var``, of every channel, with ``config.scale``; ``running_root`` (and
    ``running_root_rest`` for a smaller last block); with ``config.average == "covariance"`` ``running_cov``
    (``running_cov_rest``), of which it is the root; otherwise ``last_root`` (``last_root_rest``), of the last refresh,
    where not every step is one; ``num_updates`` (refreshes so far), ``num_steps`` (training steps so far),
    ``last_update`` (num_steps at the last refresh), ``num_skipped`` (steps left out); not saved: ``gathers`` (whether
    steps are counted now), by which processes notice that they are not in the same mode.
    """

    gathers: Tensor

    def __init__(
        self,
        channels: int,
        window: Window,
        groups: int = 1,
        config: WhiteningConfig | None = None,
        *,
        kind: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        label: str = "Whitening",
    ) -> None:
        estimator = Estimator(channels, window, groups, WhiteningConfig() if config is None else config, kind)
        super().__init__(estimator, label, device=device, dtype=dtype)
        self.frozen = False
        self.process_group: Any = None
        mode = torch.ones((), dtype=torch.int64, device=device)
        self.register_buffer("gathers", mode, persistent=False)  # DistributedDataParallel brings that of rank 0
        self.reset_statistics()

    def reset_statistics(self) -> None:
        """Forget everything: zero mean, variance one, identity roots and covariances, all counters zero."""
        super().reset_statistics()
        self.tell_mode()

    def forward(self, x: Tensor, *, by_hand: bool = False) -> Statistics | None:
        """What to fold for x ``(N, C, *spatial)``; ``None`` for nothing.

        An empty batch is no step and changes nothing.

        Args:
            by_hand: the caller takes care of the gradient of the scale; it gets the ``slope`` where there is one.

        Raises:
            StatisticsError: running values are needed and there are none; or, with ``sync``, some processes train
                while others are frozen or in evaluation mode.
        """
        shared = self._shared()
        if shared and not torch.compiler.is_compiling():
            self._check_mode()
        if not self._gathering():
            return self.remembered()
        if self._sees_single_pixels(x):
            if len(x):
                self.num_updates.clamp_(min=1)
            return None
        if shared and not self._agreed and not torch.compiler.is_compiling():
            self._read_counters()  # DistributedDataParallel may have brought those of rank 0
            self._agreed = True
        if x.numel() == 0 and not shared:
            return self._running(self._last_roots())
        again = _in_backward()  # activation checkpointing runs the forward a second time
        due = self.clock.was_due if again else self.clock.due
        if due and not again and self._pointwise():
            self.num_updates.mul_(self.num_steps > 0)  # a batch of few rows let evaluation begin, and was no refresh
        if not due:
            found = self._ordinary(x, again, by_hand)
        elif torch.compiler.is_compiling() and not shared and self._may_be_opaque():
            found = self._opaque_refresh(x)
        else:
            found = self._refresh(x, again, by_hand)
        if not again:
            self.num_steps.add_(1)
            self.clock.advance()
        return found

    def sees_few_rows(self, x: Tensor) -> bool:
        """Whether every image of x ``(N, C, *spatial)`` is one row for a 1x1 convolution; published layers take it."""
        return len(x) > 0 and self._sees_single_pixels(x)

    def _sees_single_pixels(self, x: Tensor) -> bool:
        """:meth:`sees_few_rows`, or would if there were images: no process of several may wait for the others then."""
        return self._pointwise() and math.prod(x.shape[2:]) == 1

    def _pointwise(self) -> bool:
        convolution = self.estimator.kind in ("1x1", "depthwise")
        return convolution and self.window.taps == 1 and self.config.debias

    def scales_alone(self) -> bool:
        """Whether a step now has one gradient through the statistics, that of the scale, and in this process only."""
        return self._gathering() and bool(self.config.scale) and not (self.config.differentiable or self._shared())

    def _shared(self) -> bool:
        """Whether statistics are gathered over several processes."""
        return self.config.sync and distributed(self.process_group)

    def _gathering(self) -> bool:
        return self.training and not self.frozen

    def tell_mode(self) -> None:
        """Let the other processes know whether statistics are gathered here; to be called after a change of that."""
        self._told, self._checked = self._gathering(), False
        self.gathers.fill_(self._told)

    def _check_mode(self) -> None:
        if self._told != self._gathering():  # by an assignment to `training` or `frozen`, of which nobody was told
            self.tell_mode()
        elif not self._checked or self.gathers.device.type == "cpu":  # elsewhere, looking means waiting for the device
            check_same_mode(self._told, self.gathers, self.label)
            self._checked = True

    def remembered(self) -> Statistics:
        """The running values, as evaluation uses them.

        Raises:
            StatisticsError: no statistics have been gathered yet.
        """
        if not (self._ready or self._check_ready()):
            first = "Unfreeze it (netdeconv.unfreeze(model)), then run" if self.frozen else "Run"
            raise StatisticsError(
                f"{self.label}: expected whitening statistics from at least one training step, got none so far. "
                f"{first} some batches in training mode first (model.train()), or load a trained state dict."
            )
        return self._running(self._matrices("running_root"))

    def _of_batch(self, x: Tensor, by_hand: bool = False) -> Batch:
        """What one batch says; the running values where it has none to say."""
        return self._of_batch_and_sample(x, None, by_hand)[0]

    def _of_batch_and_sample(self, x: Tensor, sample: Moments | None, by_hand: bool) -> tuple[Batch, Moments | None]:
        """:meth:`_of_batch`, and the moments of a sample, which those of other processes join in the same call."""
        moments = self.estimator.mean_of(x if self.config.differentiable else x.detach())
        channels = None if self.running_var is None else self.estimator.variance_of(x.detach() if by_hand else x)
        if self._shared():
            moments, sample, channels = self._joined(moments, sample, channels)
        several = (moments.total > 1) | (not self.config.debias)  # of a single row, the mean is all there is
        if channels is None:
            counts = all_finite((moments.mean,))
            return self._or_running(Batch(moments.mean, None, None, None, _both(counts, several))), sample
        channel_mean, var, count = channels
        counts = _both(all_finite((moments.mean, var)) & varies(var, channel_mean.square()), several)
        slope = None
        if by_hand:
            scale, slope = self.estimator.scale_and_slope(x, var, channel_mean, count)
        else:
            scale = self.estimator.scale_of(var)
        return self._or_running(Batch(moments.mean, var, scale, slope, counts)), sample

    def _joined(
        self, moments: Moments, sample: Moments | None, channels: tuple[Tensor, Tensor, int] | None
    ) -> tuple[Moments, Moments | None, tuple[Tensor, Tensor, int] | None]:
        """The same over the shares of all processes."""
        about = self.running_mean
        shares = [Share(each, self.blocks, about) for each in (moments, sample) if each is not None]
        if channels is not None:
            of_channels = self.blocks.spread_mean(about).reshape(-1, self.blocks.taps).mean(1)
            shares.append(share_of_channels(*channels, of_channels))
        moments, *rest = joined_moments(shares, self.process_group)
        if channels is not None:
            mean, (var,), count, _ = rest.pop()
            channels = mean, var.flatten(), count
        if not self.config.differentiable:  # that of the variance has come along
            moments = moments._replace(mean=moments.mean.detach())
        return moments, rest[0] if rest else None, channels

    def _or_running(self, batch: Batch) -> Batch:
        """The batch, or the running values, which are constants, where it does not count."""
        mean, var, scale, slope, counts = batch
        if counts.device.type == "cpu" and not traced() and counts:  # elsewhere, to look would mean to wait
            return batch
        mean = torch.where(counts, mean, self.running_mean.to(mean.dtype))
        if var is not None and scale is not None and self.running_var is not None:
            running = self.running_var.to(var.dtype)
            var = torch.where(counts, var, running)
            scale = torch.where(counts, scale, self.estimator.scale_of(running))
        return Batch(mean, var, scale, None if slope is None else slope.where(counts), counts)

    def _kept_roots(self) -> list[Tensor]:
        return [kept(root) for root in self._last_roots()]

    def _statistics(self, batch: Batch, roots: Sequence[Tensor]) -> Statistics:
        return Statistics(batch.mean, tuple(roots), batch.scale, batch.slope)

    def _ordinary(self, x: Tensor, again: bool, by_hand: bool) -> Statistics:
        """Mean and scale of this batch, root of the last refresh."""
        batch = self._of_batch(x, by_hand)
        if not again:
            self._remember(batch, due=False)
        return self._statistics(batch, self._kept_roots())

    def _refresh(self, x: Tensor, again: bool, by_hand: bool) -> Statistics:
        """Mean, scale and root of this batch, or the running ones where they cannot be used."""
        turn = self.num_updates - 1 if again else self.num_updates
        batch, moments, scale = self._of_batch_and_scaled_sample(x, turn, by_hand)
        if self.config.sampling == "corner":  # as published, the mean is the sample's
            batch = self._with_mean_of_sample(batch, moments.mean, scale)
        if again and self.config.average == "covariance":  # it is part of the average already
            counts = batch.counts & usable(self.estimator, moments)
            return self._statistics(self._or_running(batch._replace(counts=counts)), self._kept_roots())
        running, averages = self._matrices("running_root"), self._averages()
        roots, new, counts = refreshed(self.estimator, moments, running, averages, self._counters(), batch.counts)
        batch = self._or_running(batch._replace(counts=counts))
        if not again:
            self._remember(batch, due=True)
            self._remember_roots(roots, new, counts)
        return self._statistics(batch, roots)

    def _of_batch_and_scaled_sample(
        self, x: Tensor, turn: Tensor, by_hand: bool
    ) -> tuple[Batch, Moments, Tensor | None]:
        """:meth:`_of_batch`, the moments of a sample of scaled channels, and their scale."""
        differentiable, factored = self.config.differentiable, not self._shared()
        seen = x if differentiable else x.detach()
        if self.running_var is None:
            sample = self.estimator.sample_moments(seen, turn, factored=factored)
            batch, joined = self._of_batch_and_sample(x, sample, by_hand)
            assert joined is not None
            return batch, joined, None
        batch = self._of_batch(x, by_hand)
        assert batch.scale is not None
        scale = batch.scale if differentiable else batch.scale.detach()
        moments = self.estimator.sample_moments(seen, turn, scale, factored=factored)
        if self._shared():
            about = self.running_mean.to(scale.dtype) * self.blocks.of_channels(scale.detach()).flatten()
            (moments,) = joined_moments([Share(moments, self.blocks, about)], self.process_group)
        return batch, moments, scale

    def _with_mean_of_sample(self, batch: Batch, mean: Tensor, scale: Tensor | None) -> Batch:
        mean = mean if scale is None else mean / self.blocks.of_channels(scale).flatten()
        return batch._replace(mean=mean, counts=batch.counts & all_finite((mean,)))

    def _opaque_refresh(self, x: Tensor) -> Statistics:
        """:meth:`_refresh` for a compiler that does not have to look inside."""
        batch = self._of_batch(x)
        scale = None if batch.scale is None else batch.scale.detach()
        state = (self._matrices("running_root"), self._averages(), self._counters(), batch.counts)
        roots, new, counts = opaque_refresh(self.estimator, x.detach(), scale, *state)
        batch = self._or_running(batch._replace(counts=counts))
        self._remember(batch, due=True)
        self._remember_roots(roots, new, counts)
        return self._statistics(batch, roots)

    def _may_be_opaque(self) -> bool:
        """Whether a compiler need not see into a refresh: no gradient goes through it, no mean comes out of it.

        An eigendecomposition waits for a GPU, which a CUDA graph does not bear.
        """
        settings = self.config
        return not (settings.differentiable or settings.sampling == "corner" or settings.solver == "eigh")

    def train(self, mode: bool = True) -> Whitening:
        """Switch mode, and bring what Python knows of the counters up to date."""
        super().train(mode)
        self.tell_mode()
        self._read_counters()
        return self

    def extra_repr(self) -> str:
        default = WhiteningConfig().resolved(str(self.estimator.kind), self.blocks.channels // self.blocks.groups)
        changed = [f"{name}={value!r}" for name, value in vars(self.config).items() if value != getattr(default, name)]
        kernel = "x".join(map(str, self.window.kernel_size)) or "linear"
        return ", ".join([f"{self.blocks.channels}", kernel, *changed])


def _both(counts: Tensor, several: Tensor | bool) -> Tensor:
    if isinstance(several, Tensor):
        return counts & several
    return counts if several else torch.zeros_like(counts)


def _in_backward() -> bool:
    """Whether the autograd engine is running on this thread."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
