"""Whitening of the channels alone, as a layer of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from netdeconv.errors import ShapeError
from netdeconv.functional import Window
from netdeconv.functional.precision import without_autocast
from netdeconv.functional.tracing import as_leaf, is_symbol
from netdeconv.nn.layer import check_at_least_one, check_channels, check_floating
from netdeconv.nn.whitening import Whitening

if TYPE_CHECKING:
    from netdeconv.config import WhiteningConfig

__all__ = ["ChannelWhitening"]


class ChannelWhitening(nn.Module):
    """Decorrelates the channels at every position: ``y = D S (x - mean)``, without parameters to learn.

    For use before a pooling, or a classifier that is not whitened itself. Blocks of channels, training and evaluation
    are as in :class:`netdeconv.WhitenedConv2d` with a 1x1 kernel, except that it takes 5 steps, and whitens maps of
    one pixel too. The covariance is centred (that of the authors' code is not).

    Shapes: ``(N, C)``, ``(N, C, L)``, ``(N, C, H, W)`` or ``(N, C, D, H, W)`` -> the same.

    Args:
        num_channels: C.
        whitening: settings of the whitening, ``None`` for the defaults.

    Raises:
        ShapeError: x has the wrong number of dimensions or channels; num_channels is not positive.
        TypeError: x is not floating point.

    Source: Ye et al. 2020, section 3.5; the authors' ``ChannelDeconv``.
    """

    def __init__(
        self,
        num_channels: int,
        *,
        whitening: WhiteningConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        label = f"{type(self).__name__}({num_channels})"
        check_at_least_one("num_channels", num_channels, label)
        self.num_channels = num_channels
        everywhere = Window((1,), (1,), (1,), ((0, 0),))
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.whitening = Whitening(num_channels, everywhere, 1, whitening, kind="channels", label=label, **place)

    def forward(self, x: Tensor) -> Tensor:
        if is_symbol(x):
            return as_leaf(self, x)
        if not torch.jit.is_tracing():
            self._check(x)
        flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
        mean, roots, scale, _ = self.whitening(flat)
        blocks = self.whitening.blocks
        dtype = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x.device.type):
            centred = flat.movedim(1, -1).to(dtype) - blocks.spread_mean(mean.to(dtype)).flatten()
            if scale is not None:
                centred = centred * scale.to(dtype)
            parts = [part @ root.to(dtype) for part, root in zip(blocks.split(centred), roots, strict=True)]
            white = blocks.join(parts).movedim(-1, 1)
        white = white.to(x.dtype).reshape(x.shape)
        return white.contiguous() if x.is_contiguous() else white

    def _check(self, x: Tensor) -> None:
        label = self.whitening.label
        check_floating(x, label)
        expected = f"(N, {self.num_channels}) up to (N, {self.num_channels}, D, H, W)"
        if not 2 <= x.dim() <= 5:
            raise ShapeError(
                f"{label}: expected x of shape {expected}, got {tuple(x.shape)} with {x.dim()} dimensions. "
                "For one sample pass x.unsqueeze(0)."
            )
        check_channels(x, 1, self.num_channels, expected, label)

    def extra_repr(self) -> str:
        return f"{self.num_channels}"
