"""What one batch says, in this process or in all of them: mean, variance, scale, and a sample's covariance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from netdeconv.functional import Moments, Slope, varies, what_varies
from netdeconv.functional.tracing import traced
from netdeconv.nn.averages import update_share
from netdeconv.nn.estimator import Estimator
from netdeconv.nn.refresh import all_finite, chosen
from netdeconv.nn.running import Batch, RunningStatistics, constant
from netdeconv.nn.sync import Place, Share, distributed, joined_moments, share_of_channels

__all__ = ["BatchStatistics"]


class BatchStatistics(RunningStatistics):
    """The part of :class:`netdeconv.nn.Whitening` that looks at batches.

    Attributes:
        process_group: see :class:`netdeconv.nn.Whitening`.
    """

    def __init__(self, estimator: Estimator, label: str, **place: Any) -> None:
        super().__init__(estimator, label, **place)
        self.process_group: Any = None
        self._place: Place | None = None

    def _shared(self) -> bool:
        """Whether statistics are gathered over several processes."""
        return self.config.sync and distributed(self.process_group)

    def _of_batch(self, x: Tensor, by_hand: bool = False) -> Batch:
        """What one batch says, whether that counts or not."""
        return self._of_batch_and_sample(x, None, by_hand)[0]

    def _of_batch_and_sample(self, x: Tensor, sample: Moments | None, by_hand: bool) -> tuple[Batch, Moments | None]:
        """:meth:`_of_batch`, and the moments of a sample, which those of other processes join in the same call."""
        alone = x.detach() if x.requires_grad and torch.is_grad_enabled() else x
        moments = self.estimator.mean_of(x if self.config.differentiable else alone)
        channels = None if self.running_var is None else self.estimator.variance_of(alone if by_hand else x)
        if self._shared():
            moments, sample, channels = self._joined(moments, sample, channels)
        look = x.device.type == "cpu" and not traced()  # elsewhere, to look would mean to wait
        several = (moments.total > 1) | (not self.config.debias)  # of a single row, the mean is all there is
        counts = bool(several) if look else several
        # Where all of x has variances that are finite, so is its mean.
        if channels is None or not look or channels[2] * x.shape[1] < x.numel():
            counts = all_finite((moments.mean,), look=look) & counts
        if channels is None:
            return Batch(moments.mean, None, None, None, counts), sample
        channel_mean, var, count = channels
        all_above = False
        if look:
            any_varies, all_above = what_varies(constant(var), constant(channel_mean), self.config.eps)
            counts = counts and any_varies
        else:
            counts = counts & all_finite((var,)) & varies(var, channel_mean.square())
        if by_hand:
            scale, slope = self.estimator.scale_and_slope(x, var, channel_mean, count, all_above=all_above)
        else:
            scale, slope = self.estimator.scale_of(var), None
        return Batch(moments.mean, var, scale, slope, counts), sample

    def _by_kernels(self, kernels: Any, x: Tensor, *, remember: bool) -> Batch:
        """What this batch says, in two launches, or the running values; see :func:`netdeconv.functional.kernels.look`.

        Args:
            remember: whether this is all that the step does, and it is counted.
        """
        assert self.running_var is not None
        config, steps, rows = self.config, self._clock.steps + 1, self.estimator.rows_for_variance(x)
        x = x.detach()
        moments = self.estimator.mean_of(x)
        written = (self.running_mean, self.running_var, self.num_steps, self.num_skipped)
        scale, about, own, common, var, counts = kernels.look(
            x,
            moments.mean,
            kernels.Buffers(*written, self.num_updates),
            share=update_share(config, 1, steps, steps),
            share_of_first=self._clock.updated or (config.momentum is not None and not config.debias),
            max_rows=rows,
            eps=config.eps,
            several=moments.total > 1 or not config.debias,
            remember=remember,
        )
        if remember:
            for buffer in written:
                increment_version(buffer)  # as torch's own operators do
        return Batch(moments.mean, var, scale, Slope(about, own, common, rows, config.eps), counts)

    def _joined(
        self, moments: Moments, sample: Moments | None, channels: tuple[Tensor, Tensor, int] | None
    ) -> tuple[Moments, Moments | None, tuple[Tensor, Tensor, int] | None]:
        """The same over the shares of all processes."""
        about = self.running_mean
        shares = [Share(each, self.blocks, about) for each in (moments, sample) if each is not None]
        if channels is not None:
            of_channels = self.blocks.spread_mean(about).reshape(-1, self.blocks.taps).mean(1)
            shares.append(share_of_channels(*channels, of_channels))
        moments, *rest = joined_moments(shares, self.process_group, self._place)
        if channels is not None:
            mean, (var,), count, _ = rest.pop()
            channels = mean, var.flatten(), count
        if not self.config.differentiable:  # that of the variance has come along
            moments = moments._replace(mean=moments.mean.detach())
        return moments, rest[0] if rest else None, channels

    def _or_running(self, batch: Batch) -> Batch:
        """The batch, or the running values where it does not count."""
        if batch.counts is True:
            return batch
        scale = None if self.running_var is None else self.estimator.scale_of(self.running_var)
        return self._or_else(batch, self.running_mean, self.running_var, scale)

    @staticmethod
    def _or_else(batch: Batch, mean: Tensor, var: Tensor | None, scale: Tensor | None) -> Batch:
        """The batch, or these constants where it does not count."""
        counts = batch.counts
        if counts is True:
            return batch
        slope = None if batch.slope is None else batch.slope.where(counts)
        either = (batch.mean, mean), (batch.var, var), (batch.scale, scale)
        found = [None if new is None or old is None else chosen(counts, new, old) for new, old in either]
        assert found[0] is not None
        return Batch(found[0], found[1], found[2], slope, counts)

    def _of_batch_to_refresh(self, x: Tensor, turn: Tensor, by_hand: bool) -> tuple[Batch, Moments]:
        """:meth:`_of_batch`, and the moments of a sample of scaled channels."""
        differentiable, factored = self.config.differentiable, not self._shared()
        seen = x if differentiable else x.detach()
        if self.running_var is None:
            scale, sample = None, self.estimator.sample_moments(seen, turn, factored=factored)
            batch, joined = self._of_batch_and_sample(x, sample, by_hand)
            assert joined is not None
            sample = joined
        else:
            batch = self._of_batch(x, by_hand)
            assert batch.scale is not None
            scale = batch.scale if differentiable else batch.scale.detach()
            sample = self.estimator.sample_moments(seen, turn, scale, factored=factored)
            if self._shared():
                about = self.running_mean.to(scale.dtype) * self.blocks.of_channels(scale.detach()).flatten()
                (sample,) = joined_moments([Share(sample, self.blocks, about)], self.process_group, self._place)
        if self.config.sampling == "corner":  # as published, the mean is the sample's
            mean = sample.mean if scale is None else sample.mean / self.blocks.of_channels(scale).flatten()
            counts = batch.counts & all_finite((mean,), look=isinstance(batch.counts, bool))
            batch = batch._replace(mean=mean, counts=counts)
        return batch, sample
