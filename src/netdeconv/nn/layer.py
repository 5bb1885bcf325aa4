"""What every layer that folds whitening into its weights has in common."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from netdeconv.errors import ShapeError
from netdeconv.functional import Window, fold
from netdeconv.functional.precision import autocasts
from netdeconv.functional.tracing import traced
from netdeconv.nn.cache import FoldCache
from netdeconv.nn.whitening import Statistics, Whitening

__all__ = [
    "WhitenedLayer",
    "check_at_least_one",
    "check_channels",
    "check_conv_arguments",
    "check_fits",
    "check_floating",
]


class WhitenedLayer(nn.Module):
    """Mixin over a layer with ``weight`` and ``bias``: holds ``whitening`` and folds it in."""

    weight: Any
    bias: Any
    whitening: Whitening

    def whitened_parameters(self, x: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias that whiten x ``(N, C, *spatial)`` and then do what the layer does with this weight."""
        whitening, weight = self.whitening, self.weight if weight is None else weight
        if whitening.gathers_statistics() or torch.is_grad_enabled() or traced():
            found = whitening(x, weight=weight)
            return (weight, self.bias) if found is None else self._fold(found, weight)
        if whitening._forward_pre_hooks or whitening._forward_hooks:
            whitening(x)  # for whoever wants to see its input
        made_of = [tensor for tensor in (weight, self.bias, *whitening.remembered_in()) if tensor is not None]
        return self._cache.folded(made_of, lambda: self._fold(whitening.remembered(), weight))

    def _fold(self, found: Statistics, weight: Tensor) -> tuple[Tensor, Tensor]:
        return fold(weight, self.bias, found.mean, found.roots, self.whitening.blocks, found.scale)

    def train(self, mode: bool = True) -> WhitenedLayer:
        """Switch mode, and fold anew in the next evaluation."""
        self._cache.forget()
        return super().train(mode)

    @functools.cached_property
    def _cache(self) -> FoldCache:
        return FoldCache()

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the plain layer that equals this one in evaluation mode."""
        return self._fold(self.whitening.remembered(), self.weight)


def check_floating(x: Tensor, label: str, dtype: torch.dtype | None = None) -> None:
    """Whitening needs real numbers, and the layer those of its weight's dtype unless autocast converts them."""
    if not x.is_floating_point():
        raise TypeError(
            f"{label}: expected floating point input, got {x.dtype}. "
            "Convert it first, e.g. x.float() / 255 for 8-bit images."
        )
    if dtype is not None and x.dtype != dtype and not autocasts(x.device.type):
        raise TypeError(
            f"{label}: expected input of dtype {dtype}, that of the weight, got {x.dtype}. "
            "Convert one to the other with .to(dtype), or use torch.autocast."
        )


def check_channels(x: Tensor, dim: int, channels: int, expected: str, label: str) -> None:
    """The dimension that holds the channels has as many as the layer was made for."""
    if x.shape[dim] != channels:
        raise ShapeError(
            f"{label}: expected x of shape {expected}, got {tuple(x.shape)} with {x.shape[dim]} channels. "
            f"Pass {channels} channels, or build the layer for {x.shape[dim]}."
        )


def check_at_least_one(name: str, channels: int, label: str) -> None:
    """A layer that is made for no channels has nothing to whiten."""
    if channels < 1:
        raise ShapeError(f"{label}: expected {name} >= 1, got {channels}. Pass the number that the input has.")


def check_fits(x: Tensor, window: Window, expected: str, label: str) -> None:
    """The window fits into the padded map at least once; checked before the statistics count the step."""
    size = x.shape[x.dim() - len(window.kernel_size) :]
    if min(window.output_size(size)) < 1:
        needed = tuple(
            max(1, dilation * (kernel - 1) + 1 - sum(pads))
            for kernel, dilation, pads in zip(window.kernel_size, window.dilation, window.padding, strict=True)
        )
        raise ShapeError(
            f"{label}: expected x of shape {expected} with a map of at least {needed}, got {tuple(x.shape)}. "
            "Pass a larger map, or raise the padding."
        )
    allowed = {"reflect": 1, "circular": 0}.get(window.padding_mode)
    if allowed is not None and any(
        max(pads) > length - allowed for length, pads in zip(size, window.padding, strict=True)
    ):
        raise ShapeError(
            f"{label}: expected x of shape {expected} with a map larger than the padding {window.padding} for "
            f"padding_mode={window.padding_mode!r}, got {tuple(x.shape)}. Pass a larger map, or pad less."
        )


def check_conv_arguments(in_channels: int, out_channels: int, groups: int, label: str) -> None:
    """There are input channels, and groups divide the channels on both sides."""
    check_at_least_one("in_channels", in_channels, label)
    for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
        if groups < 1 or channels % groups:
            raise ShapeError(
                f"{label}: expected groups >= 1 that divide {name}={channels}, got groups={groups}. "
                f"Use a divisor of both in_channels={in_channels} and out_channels={out_channels}."
            )
