"""Convolutions that whiten the patches they look at."""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from netdeconv.errors import ShapeError
from netdeconv.functional import Geometry, Window, whitened_convolution
from netdeconv.functional.tracing import as_leaf, is_symbol, traced
from netdeconv.nn.layer import WhitenedLayer, check_channels, check_conv_arguments, check_fits, check_floating
from netdeconv.nn.whitening import Whitening

if TYPE_CHECKING:
    from netdeconv.config import WhiteningConfig

__all__ = ["WhitenedConv1d", "WhitenedConv2d", "WhitenedConv3d"]

_GEOMETRY = ("stride", "padding", "dilation", "padding_mode", "_reversed_padding_repeated_twice")
_FIXED = ("in_channels", "kernel_size", "groups")


class _WhitenedConv(WhitenedLayer):
    """The part that is the same in one, two and three dimensions; goes before ``torch.nn.ConvNd``."""

    _spatial: tuple[str, ...]
    in_channels: int
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: Any
    _reversed_padding_repeated_twice: list[int]
    _conv_forward: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        whitening: WhiteningConfig | None = None,
    ) -> None:
        label = f"{type(self).__name__}({in_channels}, {out_channels}, kernel_size={kernel_size})"
        check_conv_arguments(in_channels, out_channels, groups, label)
        shape: dict[str, Any] = {
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "bias": bias,
            "padding_mode": padding_mode,
        }
        super().__init__(in_channels, out_channels, kernel_size, **shape, device=device, dtype=dtype)
        sample = f"{in_channels}, {', '.join(self._spatial)})"
        self._expected = f"(N, {sample} or ({sample}"  # made here, as it is wanted at every step
        self.whitening = Whitening(
            in_channels, _window_of(self), groups, whitening, device=device, dtype=dtype, label=label
        )

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep what the whitening looks at that of the convolution, which reads its geometry at every step."""
        built = "_modules" in self.__dict__ and "whitening" in self._modules
        if built and name in _FIXED and value != getattr(self, name):
            raise ValueError(
                f"{self.whitening.label}: expected {name}={getattr(self, name)!r}, which the whitening statistics were "
                f"made for, got {value!r}. Build another layer, and put it in the place of this one."
            )
        before = getattr(self, name) if built and name in _GEOMETRY else None
        super().__setattr__(name, value)
        if before is not None:
            try:
                self.whitening.look_through(_window_of(self))
            except (TypeError, ValueError) as error:
                super().__setattr__(name, before)
                raise ValueError(
                    f"{self.whitening.label}: expected {name} as torch's convolutions take it, got {value!r}. Pass a "
                    f"number, or one for each of {len(self._spatial)} dimensions."
                ) from error

    def forward(self, input: Tensor) -> Tensor:  # torch's name for it, as calls by keyword need
        x = input
        if is_symbol(x):
            return as_leaf(self, x)
        dims = len(self._spatial)
        own = self.weight  # read once: a parametrization computes it anew
        if not torch.jit.is_tracing():
            self._check(x, own.dtype)
        geometry = self._geometry(x, own) if x.dim() == dims + 2 else None
        if geometry is None:
            weight, bias = self.whitened_parameters(x if x.dim() == dims + 2 else x.unsqueeze(0), own)
        else:
            found = self.whitening(x, by_hand=True, weight=own)
            if found is not None and found.slope is not None:
                state = (found.mean, found.roots, found.scale, found.slope, self.whitening.blocks)
                return whitened_convolution(x, own, self.bias, *state, geometry)
            weight, bias = (own, self.bias) if found is None else self._fold(found, own)
        output: Tensor = self._conv_forward(x, weight, bias)
        return output

    def _check(self, x: Tensor, dtype: torch.dtype) -> None:
        label, dims = self.whitening.label, len(self._spatial)
        check_floating(x, label, dtype)
        if x.dim() not in (dims + 1, dims + 2):
            raise ShapeError(
                f"{label}: expected x of shape {self._expected}, got {tuple(x.shape)} with {x.dim()} dimensions. "
                "Add the missing ones with x.unsqueeze(0), or use the layer for this number of dimensions."
            )
        check_channels(x, -1 - dims, self.in_channels, self._expected, label)
        check_fits(x, self.whitening.window, self._expected, label)

    def _geometry(self, x: Tensor, weight: Tensor) -> Geometry | None:
        """How x is convolved, where a training step is one autograd node; ``None`` where it is not.

        That is a step with a scale and a root without gradient, of one process, that nothing traces.
        """
        whitening, recorded = self.whitening, torch.is_grad_enabled() and weight.requires_grad
        if not (recorded and whitening.scales_alone() and self.padding_mode == "zeros") or traced():
            return None
        window = whitening.window
        if any(before != after for before, after in window.padding):
            return None
        return Geometry(window.stride, tuple(before for before, _ in window.padding), window.dilation, self.groups)


class WhitenedConv1d(_WhitenedConv, nn.Conv1d):
    """:class:`torch.nn.Conv1d` over whitened input; see :class:`WhitenedConv2d`."""

    _spatial = ("L",)


class WhitenedConv2d(_WhitenedConv, nn.Conv2d):
    """:class:`torch.nn.Conv2d` over whitened input: network deconvolution, in place of batch normalisation.

    ``y = conv((x - mean) S D) + b``: S divides every channel by its standard deviation, and D approximates the inverse
    square root of the covariance of ``x S``; mean and covariance are those of the patches under the kernel. The layer
    runs as one ordinary convolution, with S, D and the mean folded into weight and bias, and takes the place of a batch
    normalisation after the layer before.

    Training: mean and S are those of the batch, D is that of the last refresh; see :class:`netdeconv.nn.Whitening`
    for when that is, and :class:`netdeconv.WhiteningConfig` for all settings.
    Evaluation: running statistics, so that it equals a plain convolution with the parameters that ``folded()`` returns.

    Shapes: as :class:`torch.nn.Conv2d`, with or without the batch dimension. Statistics and fold are computed
    in float32 at least, also under autocast.

    Args:
        whitening: settings of the whitening, ``None`` for the defaults. All other arguments are those of
            :class:`torch.nn.Conv2d`.

    Raises:
        ShapeError: x has the wrong number of dimensions or channels, or a map smaller than the window; groups do
            not divide the channels.
        TypeError: x is not floating point.

    Example:
        >>> import torch
        >>> from netdeconv import WhitenedConv2d
        >>> layer = WhitenedConv2d(3, 16, 3, padding=1)
        >>> layer(torch.randn(8, 3, 32, 32)).shape
        torch.Size([8, 16, 32, 32])

    Source: Ye et al., Network Deconvolution, ICLR 2020, arXiv 1905.11926.
    """

    _spatial = ("H", "W")


class WhitenedConv3d(_WhitenedConv, nn.Conv3d):
    """:class:`torch.nn.Conv3d` over whitened input; see :class:`WhitenedConv2d`."""

    _spatial = ("D", "H", "W")


def _window_of(conv: Any) -> Window:
    """What this convolution looks at, as its ``_conv_forward`` reads it."""
    kernel_size = tuple(conv.kernel_size)
    stride, dilation = (_for_each(value, len(kernel_size)) for value in (conv.stride, conv.dilation))
    if conv.padding_mode != "zeros":  # torch pads by what it noted when the layer was built, last dimension first
        pads = conv._reversed_padding_repeated_twice
        padding = tuple((pads[i], pads[i + 1]) for i in range(len(pads) - 2, -1, -2))
    elif conv.padding == "same":
        padding = tuple(_same(taps, step) for taps, step in zip(kernel_size, dilation, strict=True))
    else:
        each = 0 if conv.padding == "valid" else conv.padding
        padding = tuple((pad, pad) for pad in _for_each(each, len(kernel_size)))
    return Window(kernel_size, stride, dilation, padding, conv.padding_mode)


def _for_each(value: Any, dims: int) -> tuple[int, ...]:
    """One number for every dimension, or the same for all."""
    found = (value,) * dims if isinstance(value, numbers.Integral) else tuple(value)
    if len(found) != dims or not all(isinstance(each, numbers.Integral) for each in found):
        raise ValueError(f"expected {dims} whole numbers, got {value!r}")
    return tuple(int(each) for each in found)


def _same(taps: int, dilation: int) -> tuple[int, int]:
    """What is padded before and behind so that the map keeps its size; the odd one goes behind."""
    total = dilation * (taps - 1)
    return total // 2, total - total // 2
