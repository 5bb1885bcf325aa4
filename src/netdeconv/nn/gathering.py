"""Statistics of a layer's input over a whole data set, every patch with the same weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from netdeconv.errors import NumericalError, StatisticsError
from netdeconv.functional import Blocks, Moments, channel_variance, patch_moments, varies
from netdeconv.functional.precision import at_least_float32, exact
from netdeconv.nn.whitening import Whitening

__all__ = ["Gathered", "Gatherer"]

_CHUNK = 2**24  # numbers in the patches that are held at a time: 64 MB in float32


class Gathered(NamedTuple):
    """Mean, covariances and number of patches as :class:`netdeconv.functional.Moments`, float64.

    With ``config.scale`` there is the variance of every channel, and the covariances are those of channels divided by
    its root. No covariances at all: the layer saw one row per image, and stays the plain one. ``varies`` says whether
    there is a covariance to take a root of: a single row and a constant batch have rounding errors only.
    """

    mean: Tensor
    covs: tuple[Tensor, ...]
    total: float
    var: Tensor | None = None
    varies: bool = True


class _Seen(NamedTuple):
    """Moments of some images: of the patches that are sampled; of all patches, the mean; mean and variance of channels.

    With ``config.scale`` covariances are those of single blocks, as channels are scaled before blocks are pooled.
    """

    patches: Moments
    everywhere: Moments | None
    channels: Moments | None


class Gatherer:
    """Adds up the moments of one layer's input, batch by batch.

    Args:
        whitening: the whitening that the statistics are for.
        every_position: take all patches that training may look at for the covariances; else as many as a training
            step would, others for every batch. The mean is always that of all patches, but for ``"corner"``.
    """

    def __init__(self, whitening: Whitening, every_position: bool) -> None:
        self.whitening, self.every_position = whitening, every_position
        self.batches = 0
        self._seen: _Seen | None = None
        self._single_pixels = 0

    @property
    def total(self) -> float:
        """Patches so far."""
        return self._single_pixels + (0.0 if self._seen is None else float(self._seen.patches.total))

    def add(self, x: Tensor) -> Gathered | None:
        """Take in one batch ``(N, C, *spatial)``; returns its own moments, ``None`` if it is empty."""
        self.batches += 1
        if self.whitening.sees_few_rows(x):
            self._single_pixels += len(x)
            return self._nothing()
        batch: _Seen | None = None
        for images in self._chunks(x):
            batch = self._joined(batch, self._look(exact(images)))
        self._seen = self._joined(self._seen, batch)
        return None if batch is None else self._gathered(batch)

    def moments(self) -> Gathered:
        """Moments of what came in so far.

        Raises:
            StatisticsError: nothing came in.
        """
        if not self.total:
            raise StatisticsError(
                f"{self.whitening.label}: expected input to gather statistics from, got none. The data never reach it."
            )
        return self._nothing() if self._seen is None else self._gathered(self._seen)

    @torch.no_grad()
    def settle(self, found: Gathered | None = None) -> None:
        """Make the moments of all batches the running statistics, or those of one.

        Raises:
            NumericalError: they are not finite; what was there stays.
        """
        whitening, updates = self.whitening, self.batches if found is None else 1
        found = self.moments() if found is None else found
        if not found.covs:  # training on larger maps, should it come, starts anew
            whitening.reset_statistics()
            whitening.train(whitening.training)
            return
        roots = [whitening.estimator.root_of(cov) for cov in found.covs]
        if not all(bool(value.isfinite().all()) for value in (found.mean, *roots)):
            raise NumericalError(
                f"{whitening.label}: expected finite statistics, got NaN or infinite values over {found.total:.0f} "
                "patches. Look for the batch in the data, or an overflow in half precision."
            )
        whitening.set_statistics(found.mean, roots, covs=found.covs, var=found.var, updates=updates)

    def _nothing(self) -> Gathered:
        return Gathered(torch.zeros_like(self.whitening.running_mean), (), self._single_pixels)

    def _look(self, images: Tensor) -> _Seen | None:
        whitening, blocks = self.whitening, self.whitening.blocks
        most, turn = whitening.config.max_samples, torch.tensor(self.batches, device=images.device)
        every = self.every_position
        rows, weights = whitening.estimator.sample(
            images, max_samples=None if every else most, turn=None if every else turn
        )
        if not len(rows):
            return None
        scaled, published = whitening.running_var is not None, whitening.config.sampling == "corner"
        patches = patch_moments(rows, blocks, weights, pooled=not scaled)
        everywhere = None if published else whitening.estimator.mean_of(images)
        if not scaled:
            return _Seen(patches, everywhere, None)
        mean, var, count = channel_variance(images)
        return _Seen(patches, everywhere, Moments(mean, (var,), count, count))

    def _joined(self, old: _Seen | None, new: _Seen | None) -> _Seen | None:
        if old is None or new is None:
            return new if old is None else old
        blocks = self.whitening.blocks
        outer = blocks.outer if new.channels is None else lambda away: _outer_of_each_block(blocks, away)
        ways: tuple[_Outer, ...] = (outer, lambda away: [], lambda away: [away.square()])
        parts = [
            a if b is None or a is None else _joined(a, b, way) for a, b, way in zip(old, new, ways, strict=True)
        ]
        assert parts[0] is not None
        return _Seen(parts[0], *parts[1:])

    def _gathered(self, seen: _Seen) -> Gathered:
        patches, everywhere, channels = seen
        blocks, estimator, total = self.whitening.blocks, self.whitening.estimator, float(patches.total)
        mean, covs = (patches if everywhere is None else everywhere).mean, patches.covs
        if channels is None:
            return Gathered(mean, covs, total, None, self._varies(covs, patches.mean))
        (var,) = channels.covs
        scales = blocks.split(blocks.of_channels(estimator.scale_of(var)))
        covs = tuple(
            (cov * scale.unsqueeze(-1) * scale.unsqueeze(-2)).mean(1).reshape(shape)
            for cov, scale, shape in zip(covs, scales, blocks.root_shapes, strict=True)
        )
        some = self._varies((torch.diag(var),), channels.mean) and self._varies(covs, torch.ones_like(var))
        return Gathered(mean, covs, total, var, some)

    def _varies(self, covs: Sequence[Tensor], mean: Tensor) -> bool:
        """Whether covariances are more than rounding, in the precision in which a constant came in as one."""
        dtype = at_least_float32(self.whitening.running_mean.dtype)
        most = torch.stack([cov.diagonal(dim1=-2, dim2=-1).max() for cov in covs]).max()
        return bool(varies(most.to(dtype), mean.square().max().to(dtype)))

    def _chunks(self, x: Tensor) -> Sequence[Tensor]:
        """So many images at a time that their patches fit; a published row sample counts over the whole batch."""
        window = self.whitening.window
        if not self.every_position or (self.whitening.config.sampling == "corner" and window.taps == 1):
            return (x,)
        each = self.whitening.blocks.channels * window.taps * math.prod(window.output_size(x.shape[2:]))
        return x.split(max(1, _CHUNK // max(1, each)))


_Outer = Callable[[Tensor], Sequence[Tensor]]


def _joined(old: Moments, new: Moments, outer: _Outer) -> Moments:
    """The moments of two sets of rows together; ``outer`` makes the covariances of a difference of their means."""
    total = old.total + new.total
    share, away = new.total / total, new.mean - old.mean
    covs = tuple(
        a + share * (b - a) + share * (1 - share) * between
        for a, b, between in zip(old.covs, new.covs, outer(away), strict=False)
    )
    return Moments(old.mean + share * away, covs, old.rows + new.rows, total)


def _outer_of_each_block(blocks: Blocks, away: Tensor) -> list[Tensor]:
    parts = blocks.split(away.reshape(blocks.groups, -1))
    return [part.unsqueeze(-1) * part.unsqueeze(-2) for part in parts]
