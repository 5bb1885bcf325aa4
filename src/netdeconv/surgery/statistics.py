"""Statistics of a layer's input over a whole data set, and putting them in the place of the remembered ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from netdeconv.errors import NumericalError, StatisticsError
from netdeconv.functional import Moments, Sample, Window, patch_moments
from netdeconv.nn import Whitening

__all__ = ["Gathered", "Gatherer", "input_rows", "put", "remember"]

_CHUNK = 2**24  # numbers in the patches that are held at a time: 64 MB in float32
_SETTLED = 1e-6  # the weight that the time before the data still has in the running averages


class Gathered(NamedTuple):
    """Mean and covariances as :class:`netdeconv.functional.Moments`, and the number of patches; float64."""

    mean: Tensor
    covs: tuple[Tensor, ...]
    total: float


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
        self.total = 0.0
        self._about: Tensor | None = None  # sums are taken about this mean, or large means would cost digits
        self._away: Tensor | None = None
        self._squares: list[Tensor] = []
        self._means: Any = None  # sum over all patches; none where the mean is that of the sample
        self._seen = 0.0

    def add(self, x: Tensor) -> Gathered | None:
        """Take in one batch ``(N, C, *spatial)``; returns its own moments, ``None`` if it is empty."""
        part = Gatherer(self.whitening, self.every_position)
        for images in self._chunks(x):
            sample = self._sample(images)
            if sample.rows.shape[0]:
                moments = patch_moments(sample.rows.double(), self.whitening.blocks, sample.weights)
                part._add(Gathered(moments.mean, moments.covs, float(moments.total)))
                if self.whitening.config.sampling != "corner":
                    part._add_mean(self.whitening.estimator.mean_of(images.double()))
        self.batches += 1
        if part.total == 0:
            return None
        self._add(part._of_sample())
        if part._seen:
            self._means = part._means if self._means is None else self._means + part._means
            self._seen += part._seen
        return part.moments()

    def moments(self) -> Gathered:
        """Moments of what came in so far.

        Raises:
            StatisticsError: nothing came in.
        """
        found = self._of_sample()
        return found._replace(mean=self._means / self._seen) if self._seen else found

    def _add_mean(self, moments: Moments) -> None:
        total = moments.mean * moments.total
        self._means = total if self._means is None else self._means + total
        self._seen += float(moments.total)

    def _of_sample(self) -> Gathered:
        if self._about is None or self._away is None:
            raise StatisticsError(
                f"{self.whitening.label}: expected input to gather statistics from, got none. The data never reach it."
            )
        away = self._away / self.total
        outer = self.whitening.blocks.outer(away)
        covs = tuple(square / self.total - mine for square, mine in zip(self._squares, outer, strict=True))
        return Gathered(self._about + away, covs, self.total)

    def _add(self, moments: Gathered) -> None:
        if self._about is None or self._away is None:
            self._about, self._away = moments.mean, torch.zeros_like(moments.mean)
            self._squares = [torch.zeros_like(cov) for cov in moments.covs]
        away = moments.mean - self._about
        self._away = self._away + away * moments.total
        outer = self.whitening.blocks.outer(away)
        self._squares = [
            square + (cov + mine) * moments.total
            for square, cov, mine in zip(self._squares, moments.covs, outer, strict=True)
        ]
        self.total += moments.total

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
        return sample(images, max_samples=whitening.config.max_samples, turn=torch.tensor(self.batches))


def input_rows(x: Tensor, window: Window) -> Tensor:
    """A layer's input as ``(N, C, *spatial)``: with a batch dimension, or for a linear layer as rows."""
    if not window.kernel_size:
        return x.reshape(-1, x.shape[-1])
    return x if x.dim() == len(window.kernel_size) + 2 else x.unsqueeze(0)


@torch.no_grad()
def remember(whitening: Whitening, moments: Gathered, updates: int) -> None:
    """Make these the remembered statistics, as if training had seen nothing else for long.

    The schedule continues past its dense warm-up, and later refreshes blend into these values by the momentum.

    Raises:
        NumericalError: they are not finite; what was remembered stays.
    """
    roots = [whitening.estimator.root_of(cov) for cov in moments.covs]
    if not all(bool(value.isfinite().all()) for value in (moments.mean, *roots)):
        raise NumericalError(
            f"{whitening.label}: expected finite statistics, got NaN or infinite values over {moments.total:.0f} "
            "patches. Look for the batch in the data, or an overflow in half precision."
        )
    put(whitening, moments.mean, roots, updates)


@torch.no_grad()
def put(whitening: Whitening, mean: Tensor, roots: Sequence[Tensor], updates: int) -> None:
    """Write mean and roots into the buffers, as remembered values and as those of the last refresh."""
    for name, value in zip(("mean", "root", "root_rest"), (mean, *roots), strict=False):
        for kind in ("running", "last"):
            buffer: Any = getattr(whitening, f"{kind}_{name}", None)
            if buffer is not None:
                buffer.copy_(value.reshape(buffer.shape))
    _settle(whitening, updates)


def _settle(whitening: Whitening, updates: int) -> None:
    """Set the counters to a time at which the warm-up is over and the averages no longer know their start."""
    config = whitening.config
    steps = 16 * max(1, config.update_every)  # a multiple of the interval, so that the next step refreshes
    if config.momentum is not None and 0 < config.momentum < 1:
        needed = math.ceil(2 * math.log(_SETTLED) / math.log1p(-config.momentum))  # kept roots count for half of them
        steps *= math.ceil(needed / steps)
    whitening.num_updates.fill_(max(1, updates))
    whitening.num_steps.fill_(steps)
    whitening.last_update.fill_(steps)
    whitening.num_skipped.zero_()
    whitening.train(whitening.training)  # lets it look at the counters
