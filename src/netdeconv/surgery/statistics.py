"""Statistics of a layer's input over a whole data set, and putting them in the place of the remembered ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from netdeconv.errors import NumericalError, StatisticsError
from netdeconv.functional import Blocks, Sample, Window, channel_variance, patch_moments
from netdeconv.functional.precision import exact
from netdeconv.nn import Whitening

__all__ = ["Gathered", "Gatherer", "input_rows", "put", "remember", "varies"]

_CHUNK = 2**24  # numbers in the patches that are held at a time: 64 MB in float32
_ROUNDING = 1e-12  # of float64, squared mean to variance
_SETTLED = 1e-6  # the weight that the time before the data still has in the running averages


_CHANNELS = Blocks(1, 1, 1, 1)  # of moments without covariances


class Gathered(NamedTuple):
    """Mean, covariances and number of patches as :class:`netdeconv.functional.Moments`, float64.

    With ``config.scale`` there is the variance of every channel, and the covariances are those of channels divided by
    its root. No covariances at all: the layer saw one row per image, and stays the plain one.
    """

    mean: Tensor
    covs: tuple[Tensor, ...]
    total: float
    var: Tensor | None = None


def varies(moments: Gathered) -> bool:
    """Whether there is a covariance to take a root of; a single row and a constant batch have rounding errors only."""
    if not moments.covs:
        return True
    least = _ROUNDING * (1.0 if moments.var is not None else float(moments.mean.square().max()))
    return max(float(cov.diagonal(dim1=-2, dim2=-1).max()) for cov in moments.covs) > least


class _Sums:
    """Mean and covariances of everything that came in, by sums about the first mean, or large means would cost digits.

    Covariances are those of single blocks where ``each_block``, as channels are to be scaled before blocks are pooled.
    """

    def __init__(self, blocks: Blocks, each_block: bool) -> None:
        self.blocks, self.each_block = blocks, each_block
        self.total = 0.0
        self._about: Any = None
        self._away: Any = 0.0
        self._squares: list[Any] = []

    def add(self, mean: Tensor, covs: Sequence[Tensor], total: float) -> None:
        """Take in moments of so many rows."""
        if self._about is None:
            self._about, self._squares = mean, [0.0] * len(covs)
        away = mean - self._about
        self._away = self._away + away * total
        self._squares = [
            square + (cov + mine) * total
            for square, cov, mine in zip(self._squares, covs, self._outer(away), strict=False)
        ]
        self.total += total

    def moments(self) -> tuple[Tensor, list[Tensor]]:
        """Of all that came in."""
        away = self._away / self.total
        covs = [square / self.total - mine for square, mine in zip(self._squares, self._outer(away), strict=False)]
        return self._about + away, covs

    def _outer(self, away: Tensor) -> list[Tensor]:
        if not self._squares:
            return []
        if not self.each_block:
            return self.blocks.outer(away)
        parts = self.blocks.split(away.reshape(self.blocks.groups, -1))
        return [part.unsqueeze(-1) * part.unsqueeze(-2) for part in parts]


class Gatherer:
    """Adds up the moments of one layer's input, batch by batch, every patch with the same weight.

    Args:
        whitening: the whitening that the statistics are for.
        every_position: take all patches that training may look at for the covariances; else as many as a training
            step would, others for every batch. The mean is always that of all patches, but for ``"corner"``.
    """

    def __init__(self, whitening: Whitening, every_position: bool) -> None:
        self.whitening, self.every_position = whitening, every_position
        self.batches = 0
        self._scaled = whitening.running_var is not None
        self._patches = _Sums(whitening.blocks, each_block=self._scaled)
        self._all = _Sums(whitening.blocks, each_block=False)  # means of all patches, without covariances
        self._channels = _Sums(_CHANNELS, each_block=False)  # mean and mean square of every channel
        self._sums = (self._patches, self._all, self._channels)
        self._plain = 0

    @property
    def total(self) -> float:
        """Patches so far."""
        return self._patches.total + self._plain

    def add(self, x: Tensor) -> Gathered | None:
        """Take in one batch ``(N, C, *spatial)``; returns its own moments, ``None`` if it is empty."""
        self.batches += 1
        if self.whitening.sees_few_rows(x):
            self._plain += len(x)
            return self._as_plain()
        own = Gatherer(self.whitening, self.every_position)
        own.batches = self.batches - 1  # which positions it looks at
        for images in self._chunks(x):
            own._add(images)
        if not own.total:
            return None
        for mine, its in zip(self._sums, own._sums, strict=True):
            if its.total:
                mine.add(*its.moments(), its.total)
        return own.moments()

    def moments(self) -> Gathered:
        """Moments of what came in so far.

        Raises:
            StatisticsError: nothing came in.
        """
        if not self.total:
            raise StatisticsError(
                f"{self.whitening.label}: expected input to gather statistics from, got none. The data never reach it."
            )
        if not self._patches.total:
            return self._as_plain()
        mean, covs = self._patches.moments()
        if self._all.total:
            mean, _ = self._all.moments()
        if not self._scaled:
            return Gathered(mean, tuple(covs), self.total)
        about, second = self._channels.moments()[0].chunk(2)
        var = second - about.square()
        return Gathered(mean, tuple(self._correlations(covs, var)), self.total, var)

    def _as_plain(self) -> Gathered:
        return Gathered(torch.zeros_like(self.whitening.running_mean), (), self._plain)

    def _correlations(self, covs: Sequence[Tensor], var: Tensor) -> list[Tensor]:
        """Covariances of single blocks, ``(groups, blocks, n, n)``, to those of scaled channels, pooled."""
        blocks = self.whitening.blocks
        scales = blocks.split(blocks.of_channels(self.whitening.estimator.scale_of(var)))
        return [
            (cov * scale.unsqueeze(-1) * scale.unsqueeze(-2)).mean(1).reshape(shape)
            for cov, scale, shape in zip(covs, scales, blocks.root_shapes, strict=True)
        ]

    def _add(self, images: Tensor) -> None:
        images = exact(images)
        sample = self._sample(images)
        if not sample.rows.shape[0]:
            return
        moments = patch_moments(
            sample.rows, self.whitening.blocks, sample.weights, pooled=not self._scaled
        )
        self._patches.add(moments.mean, moments.covs, float(moments.total))
        if self.whitening.config.sampling != "corner":
            everywhere = self.whitening.estimator.mean_of(images)
            self._all.add(everywhere.mean, (), float(everywhere.total))
        if self._scaled:
            mean, var, count = channel_variance(images)
            self._channels.add(torch.cat([mean, var + mean.square()]), (), count)

    def _chunks(self, x: Tensor) -> Sequence[Tensor]:
        """So many images at a time that their patches fit; a published row sample counts over the whole batch."""
        window = self.whitening.window
        if not self.every_position or (self.whitening.config.sampling == "corner" and window.taps == 1):
            return (x,)
        each = self.whitening.blocks.channels * window.taps * math.prod(window.output_size(x.shape[2:]))
        return x.split(max(1, _CHUNK // max(1, each)))

    def _sample(self, images: Tensor) -> Sample:
        whitening = self.whitening
        sample = whitening.estimator.sample
        if self.every_position:
            return sample(images)
        turn = torch.tensor(self.batches, device=images.device)
        return sample(images, max_samples=whitening.config.max_samples, turn=turn)


def input_rows(x: Tensor, window: Window) -> Tensor:
    """A layer's input as ``(N, C, *spatial)``: with a batch dimension, or for a linear layer as rows."""
    if not window.kernel_size:
        return x.reshape(-1, x.shape[-1])
    return x if x.dim() == len(window.kernel_size) + 2 else x.unsqueeze(0)


@torch.no_grad()
def remember(whitening: Whitening, moments: Gathered, updates: int) -> None:
    """Make these the running statistics, as if training had seen nothing else for long.

    The schedule continues past its dense warm-up, and later refreshes blend into these values by the momentum.

    Raises:
        NumericalError: they are not finite; what was remembered stays.
    """
    if not moments.covs:  # training on larger maps, should it come, starts anew
        whitening.reset_statistics()
        whitening.train(whitening.training)
        return
    roots = [whitening.estimator.root_of(cov) for cov in moments.covs]
    if not all(bool(value.isfinite().all()) for value in (moments.mean, *roots)):
        raise NumericalError(
            f"{whitening.label}: expected finite statistics, got NaN or infinite values over {moments.total:.0f} "
            "patches. Look for the batch in the data, or an overflow in half precision."
        )
    if whitening.running_var is not None and moments.var is not None:
        whitening.running_var.copy_(moments.var)
    _fill(whitening, "running_cov", moments.covs)
    put(whitening, moments.mean, roots, updates)


@torch.no_grad()
def put(whitening: Whitening, mean: Tensor, roots: Sequence[Tensor], updates: int) -> None:
    """Write mean and roots into the buffers, as running values and as those of the last refresh."""
    whitening.running_mean.copy_(mean.reshape(whitening.running_mean.shape))
    _fill(whitening, "running_root", roots)
    _fill(whitening, "last_root", roots)
    _settle(whitening, updates)


def _fill(whitening: Whitening, kind: str, matrices: Sequence[Tensor]) -> None:
    """Write the buffers of one kind of matrix, where there are such."""
    for name, matrix in zip((kind, f"{kind}_rest"), matrices, strict=False):
        buffer: Any = getattr(whitening, name, None)
        if buffer is not None:
            buffer.copy_(matrix.reshape(buffer.shape))


def _settle(whitening: Whitening, updates: int) -> None:
    """Set the counters to a time at which the warm-up is over and the averages no longer know their start."""
    config = whitening.config
    assert config.update_every is not None
    steps = 16 * config.update_every  # a multiple of the interval, so that the next step refreshes
    if config.momentum is not None and 0 < config.momentum < 1:
        needed = math.ceil(2 * math.log(_SETTLED) / math.log1p(-config.momentum))  # kept roots count for half of them
        steps *= math.ceil(needed / steps)
    whitening.num_updates.fill_(max(1, updates))
    whitening.num_steps.fill_(steps)
    whitening.last_update.fill_(steps)
    whitening.num_skipped.zero_()
    whitening.train(whitening.training)  # lets it look at the counters
