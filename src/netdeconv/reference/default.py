"""What this library does by default: channels scaled by their deviation, averaged statistics, roots that are kept.

Settings are those of ``WhiteningConfig``, by the same names, with nothing left to choose; no limit on the number of
patches is known here. Averages are written out over everything that was seen, without a recursion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from netdeconv.reference.paper import (
    Ints,
    Padding,
    add_eps,
    deconvolve,
    im2col,
    moments_contiguous,
    newton_schulz,
    whiten_patches,
)


def refreshes(step: int, update_every: int) -> bool:
    """Whether the root is computed at this training step, counted from 0: at all of the first 16, then every 2nd up to
    step 32, every 4th up to 64, and so on, never less often than every ``update_every``-th."""
    distance = 1
    while step >= 16 * distance and distance < update_every:
        distance *= 2
    return step % min(distance, update_every) == 0


def scale_of(x: Tensor, eps: float) -> Tensor:
    """S of x (batch, C, *size), (C,), from the biased variance V of every channel."""
    return _scale(_variance(x), eps)


def _scale(V: Tensor, eps: float) -> Tensor:
    """``max(V, mean(V) / 100, eps)^(-1/2)``."""
    return V.maximum(V.mean() / 100).clamp(min=eps).rsqrt()


def _variance(x: Tensor) -> Tensor:
    return x.double().transpose(0, 1).flatten(1).var(1, correction=0)


def weighted_average(values: Sequence[Tensor], counts: Sequence[float], momentum: float | None) -> Tensor:
    """Average of values, oldest first, each of which stands for so many training steps.

    One step counts ``1 - momentum`` times as much as the next one; of several, for which one value stands, the first
    takes the share of all. Without momentum every step counts the same.
    """
    if momentum is None:
        weights = list(counts)
    else:
        keep = 1 - momentum
        weights = [(1 - keep**count) * keep ** sum(counts[place + 1 :]) for place, count in enumerate(counts)]
    return torch.stack([w / sum(weights) * value for w, value in zip(weights, values, strict=True)]).sum(0)


def average_of_roots(roots: Sequence[Tensor], counts: Sequence[float], momentum: float | None) -> Tensor:
    """Average of D (..., n, n) in which the gain of a feature, ``g = D_ii``, is averaged as ``1 / g^2``, a variance.

    What is left of D, ``D_ij / sqrt(g_i g_j)``, is averaged as it is.
    """
    gains = [D.diagonal(dim1=-2, dim2=-1) for D in roots]
    shapes = [D / (g.unsqueeze(-1) * g.unsqueeze(-2)).sqrt() for D, g in zip(roots, gains, strict=True)]
    g = weighted_average([g**-2 for g in gains], counts, momentum).rsqrt()
    return weighted_average(shapes, counts, momentum) * (g.unsqueeze(-1) * g.unsqueeze(-2)).sqrt()


class _Used(NamedTuple):
    """What is put between the patches and w."""

    mu: Tensor
    S: Tensor | None
    D: Tensor
    D_rest: Tensor | None

    def whiten(self, X: Tensor, channels: int) -> Tensor:
        return whiten_patches(
            X, self.mu, self.D, D_rest=self.D_rest, S=self.S, channels=channels, grouping="contiguous"
        )


class _Statistics:
    """mu, S and D over the training steps of one layer.

    ``average="covariance"``: D is that of R, in training and in evaluation. ``"root"``: in training D of the last
    refresh; in evaluation the average of all D, one after k steps counting as ``(k + 1) / 2`` of them.
    """

    def __init__(
        self,
        channels: int,
        taps: int = 1,
        groups: int = 1,
        *,
        block_size: int,
        eps: float,
        num_iters: int,
        momentum: float | None,
        scale: bool,
        update_every: int,
        differentiable: bool,
        average: str,
        piece: int | None = None,
    ) -> None:
        self.cut: dict[str, Any] = {"channels": channels, "groups": groups, "block_size": block_size, "piece": piece}
        self.taps = taps
        self.eps, self.num_iters, self.momentum = eps, num_iters, momentum
        self.scale, self.update_every = scale, update_every
        self.differentiable, self.average = differentiable, average
        self.steps = 0
        self.mus: list[Tensor] = []
        self.Vs: list[Tensor] = []
        self.parts: list[list[Tensor]] = []  # of every refresh: Cov or D, of the full blocks and of the smaller last
        self.waited: list[int] = []
        self.last_D: list[Tensor] = []

    def trained(self, x: Tensor, X: Tensor, sample: Tensor) -> _Used:
        """One training step on x (batch, C, *size) with patches X; the covariance is that of ``sample`` only."""
        known = (lambda value: value) if self.differentiable else Tensor.detach
        mu, S = known(X).mean(0), scale_of(x, self.eps) if self.scale else None
        self.mus.append(mu.detach())
        self.Vs.append(_variance(x).detach())
        D = self.last_D
        if refreshes(self.steps, self.update_every):
            scaled = known(sample) if S is None else known(sample) * known(S).repeat_interleave(self.taps)
            moments = moments_contiguous(scaled, **self.cut)
            Covs = [Cov for Cov in (moments.Cov, moments.Cov_rest) if Cov is not None]
            self.waited.append(self.steps - sum(self.waited) + 1)
            if self.average == "covariance":
                self.parts.append([Cov.detach() for Cov in Covs])
                D = self.running_D()
            else:
                D = [self._root(Cov) for Cov in Covs]
                self.parts.append([each.detach() for each in D])
            self.last_D = [each.detach() for each in D]
        self.steps += 1
        return _Used(mu, S, D[0], D[1] if len(D) > 1 else None)

    def identity(self) -> _Used:
        """What changes nothing."""
        channels, groups = self.cut["channels"], self.cut["groups"]
        eye = torch.eye(channels // groups * self.taps, dtype=torch.float64)
        return _Used(torch.zeros(channels * self.taps, dtype=torch.float64), None, eye.repeat(groups, 1, 1), None)

    def running(self) -> _Used:
        """What evaluation uses; before any step that is :meth:`identity`."""
        if not self.steps:
            return self.identity()
        D = self.running_D()
        S = _scale(self.running_V(), self.eps) if self.scale else None
        return _Used(self.running_mu(), S, D[0], D[1] if len(D) > 1 else None)

    def running_mu(self) -> Tensor:
        return weighted_average(self.mus, [1] * self.steps, self.momentum)

    def running_V(self) -> Tensor:
        return weighted_average(self.Vs, [1] * self.steps, self.momentum)

    def running_R(self) -> list[Tensor]:
        ones = [1] * len(self.parts)  # every refresh counts the same, however long it was waited for
        return [weighted_average(Covs, ones, self.momentum) for Covs in zip(*self.parts, strict=True)]

    def running_D(self) -> list[Tensor]:
        if self.average == "covariance":
            return [self._root(R) for R in self.running_R()]
        counts = self.waited if self.momentum is None else [(waited + 1) / 2 for waited in self.waited]
        return [average_of_roots(D, counts, self.momentum) for D in zip(*self.parts, strict=True)]

    def _root(self, Cov: Tensor) -> Tensor:
        return newton_schulz(add_eps(Cov, self.eps), self.num_iters)


class DefaultConv:
    """The convolution on given parameters, in one to three dimensions.

    The covariance is that of patches at every ``sampling_stride``-th position from the corner on, where the kernel has
    several taps, mu that of all patches. One tap and a map of one pixel: one row for every image, too few for a
    covariance; the layer is the plain one.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        sampling_stride: int,
        stride: Ints = 1,
        padding: Padding = 0,
        dilation: Ints = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        **settings: Any,
    ) -> None:
        self.weight, self.bias, self.groups = weight, bias, groups
        self.kernel_size = tuple(weight.shape[2:])
        self.window: dict[str, Any] = {"padding": padding, "dilation": dilation, "padding_mode": padding_mode}
        dims = len(self.kernel_size)
        self.stride = (stride,) * dims if isinstance(stride, int) else stride
        self.sampling_stride = sampling_stride if math.prod(self.kernel_size) > 1 else 1
        self.statistics = _Statistics(weight.shape[1] * groups, math.prod(self.kernel_size), groups, **settings)

    def __call__(self, x: Tensor, *, training: bool) -> Tensor:
        if training and math.prod(self.kernel_size) == math.prod(x.shape[2:]) == 1:
            used = self.statistics.identity()
        elif training:
            apart = tuple(self.sampling_stride * s for s in self.stride)
            X, sample = (
                im2col(x, kernel_size=self.kernel_size, stride=s, **self.window).flatten(0, 1)
                for s in (self.stride, apart)
            )
            used = self.statistics.trained(x, X, sample)
        else:
            used = self.statistics.running()
        options: dict[str, Any] = {"stride": self.stride, "groups": self.groups, **self.window}
        return deconvolve(
            x, self.weight, self.bias, used.mu, used.D, D_rest=used.D_rest, S=used.S, grouping="contiguous", **options
        )


class DefaultLinear:
    """The linear layer on given parameters; x (..., in_features), all rows of which are looked at."""

    def __init__(self, weight: Tensor, bias: Tensor | None, **settings: Any) -> None:
        self.weight, self.bias = weight, bias
        self.statistics = _Statistics(weight.shape[1], **settings)

    def __call__(self, x: Tensor, *, training: bool) -> Tensor:
        X = x.double().reshape(-1, x.shape[-1])
        used = self.statistics.trained(X, X, X) if training else self.statistics.running()
        y = used.whiten(X, X.shape[1]).reshape(x.shape) @ self.weight.double().T
        return y if self.bias is None else y + self.bias.double()


class DefaultChannels:
    """Whitening of the channels alone: ``y = (X - mu) S D`` at every position of x (batch, C, *size)."""

    def __init__(self, channels: int, **settings: Any) -> None:
        self.statistics = _Statistics(channels, **settings)

    def __call__(self, x: Tensor, *, training: bool) -> Tensor:
        last = x.double().movedim(1, -1)
        X = last.reshape(-1, x.shape[1])
        used = self.statistics.trained(X, X, X) if training else self.statistics.running()
        return used.whiten(X, x.shape[1]).reshape(last.shape).movedim(-1, 1)
