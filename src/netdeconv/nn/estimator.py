"""What one batch says about the patches that a layer looks at: mean, scale, covariance, and its inverse root."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from typing import Any

import torch
from torch import Tensor

from netdeconv.config import WhiteningConfig
from netdeconv.functional import (
    Blocks,
    Moments,
    Sample,
    Slope,
    Window,
    channel_variance,
    corner_patches,
    inverse_sqrt,
    inverse_sqrt_of_rows,
    mean_patch,
    patch_moments,
    scale_and_slope,
    scale_of,
    spread_patches,
)

__all__ = ["Estimator", "kind_of"]

# Fewer patches are sampled where they are as long as those of large kernels: 256 MiB in float32.
_ENTRIES_OF_SAMPLE = 2**26
# A variance is that of some images of the batch, at least so many positions and so many images.
_ROWS_FOR_VARIANCE, _IMAGES_FOR_VARIANCE = 8192, 16


def kind_of(window: Window, channels: int, groups: int) -> str:
    """The kind of a layer that looks at its input so, one of :data:`netdeconv.config.KINDS`."""
    if not window.kernel_size:
        return "linear"
    if 1 < groups == channels:
        return "depthwise"
    if window.taps == 1:
        return "1x1"
    return "grouped" if groups > 1 else "dense"


@dataclasses.dataclass(frozen=True)
class Estimator:
    """Statistics of batches, without any memory of them.

    Args:
        channels: channels of the layer's input.
        window: what the layer looks at.
        groups: convolution groups.
        config: all settings; those that are ``None`` become the kind's.
        kind: the kind of layer, ``None`` for that of window and groups.

    Attributes:
        blocks: how the patches are cut.
        serialized: all of it in one line, from which :meth:`deserialize` makes it again.
    """

    channels: int
    window: Window
    groups: int
    config: WhiteningConfig
    kind: str | None = None
    blocks: Blocks = dataclasses.field(init=False, repr=False, compare=False)
    serialized: str = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        kind = kind_of(self.window, self.channels, self.groups) if self.kind is None else self.kind
        config = self.config.resolved(kind, self.channels // self.groups, self.window.taps, self.groups)
        assert config.block_size is not None
        plain: dict[str, Any] = {"channels": self.channels, "groups": self.groups, "kind": kind}
        plain |= {"window": dataclasses.asdict(self.window), "config": dataclasses.asdict(config)}
        blocks = Blocks.plan(self.channels, self.window, self.groups, config.block_size, config.grouping)
        derived = {"kind": kind, "config": config, "blocks": blocks, "serialized": json.dumps(plain, default=_plain)}
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def mean_of(self, x: Tensor) -> Moments:
        """Moments of all patches of x ``(N, C, *spatial)``, without covariances."""
        mean = self.blocks.pooled_mean(mean_patch(x, self.window))
        return Moments(mean, (), x.shape[0], x.shape[0] * math.prod(self.window.output_size(x.shape[2:])))

    def variance_of(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """Mean and variance of every channel of x, and of how many entries they are; the variance has a gradient."""
        return channel_variance(x, max_rows=self.rows_for_variance(x))

    @staticmethod
    def rows_for_variance(x: Tensor) -> int:
        """How many positions of x are enough for a variance."""
        positions = x.numel() // max(1, x.shape[0] * x.shape[1])
        return max(_ROWS_FOR_VARIANCE, _IMAGES_FOR_VARIANCE * positions)

    def scale_and_slope(
        self, x: Tensor, var: Tensor, mean: Tensor, count: int, *, all_above: bool
    ) -> tuple[Tensor, Slope]:
        """The scale, and its gradient where that is computed by hand; arguments of and from :meth:`variance_of`."""
        most, eps = self.rows_for_variance(x), self.config.eps
        return scale_and_slope(var, mean, count, max_rows=most, eps=eps, all_above=all_above)

    def scale_of(self, var: Tensor) -> Tensor:
        """What every channel is multiplied by; see :func:`netdeconv.functional.scale_of`."""
        return scale_of(var, self.config.eps)

    def sample(self, x: Tensor, *, max_samples: int | None = None, turn: Tensor | None = None) -> Sample:
        """The patches of x ``(N, C, *spatial)`` that the covariance is of, by ``config.sampling``.

        Args:
            max_samples, turn: see :func:`netdeconv.functional.spread_patches`; a published sample has neither.
        """
        stride = self.config.sampling_stride
        if self.config.sampling == "corner":
            return corner_patches(x, self.window, sampling_stride=stride)
        if self.config.sampling == "tiles" and self.window.taps > 1:
            return spread_patches(x, self.window, grid=stride, max_samples=max_samples, turn=turn)
        # Without a limit every patch, where the stride would only save time.
        wanted = stride if turn is not None else 1
        return spread_patches(x, self.window, sampling_stride=wanted, max_samples=max_samples, turn=turn)

    def sample_moments(self, x: Tensor, turn: Tensor, scale: Tensor | None = None, *, factored: bool) -> Moments:
        """Moments of a sample of the size that a refresh takes, another one on every turn.

        Args:
            x: ``(N, C, *spatial)``.
            turn: 0-dim integer tensor that counts refreshes.
            scale: what every channel is multiplied by first; the moments are those of the products.
            factored: factors instead of covariances where an iteration is shorter on the rows.
        """
        most = self.config.max_samples
        if most is not None:
            most = min(most, max(1, _ENTRIES_OF_SAMPLE // (self.channels * self.window.taps)))
        rows, weights = self.sample(x, max_samples=most, turn=turn)
        if scale is not None:
            rows = rows.to(scale.dtype) * self.blocks.of_channels(scale).flatten()
        factored = factored and self.config.solver != "eigh" and self.config.average == "root"
        return patch_moments(rows, self.blocks, weights, factored=factored)

    def root_of(self, cov: Tensor) -> Tensor:
        """The root of a covariance, or of the one that a factor stands for."""
        options: dict[str, Any] = {"num_iters": self.config.num_iters, "solver": self.config.solver}
        if cov.shape[-2] < cov.shape[-1]:
            return inverse_sqrt_of_rows(cov, eps=self.config.eps, **options)
        eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
        return inverse_sqrt(cov + self.config.eps * eye, **options)

    @classmethod
    @functools.lru_cache(maxsize=1024)
    def deserialize(cls, serialized: str) -> Estimator:
        """What was :attr:`serialized`."""
        found = json.loads(serialized)
        window = Window(**{key: _tuples(value) for key, value in found["window"].items()})
        return cls(found["channels"], window, found["groups"], WhiteningConfig(**found["config"]), found["kind"])


def _plain(number: Any) -> Any:
    """A number of NumPy's as one of Python's."""
    return number.item()


def _tuples(found: Any) -> Any:
    """JSON has lists where a window has tuples."""
    return tuple(map(_tuples, found)) if isinstance(found, list) else found
