"""A linear layer that whitens its input features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from netdeconv.errors import ShapeError
from netdeconv.functional import Window
from netdeconv.functional.precision import as_dtype, autocasts
from netdeconv.functional.tracing import as_leaf, is_symbol
from netdeconv.nn.layer import WhitenedLayer, check_at_least_one, check_channels, check_floating
from netdeconv.nn.whitening import Whitening

if TYPE_CHECKING:
    from netdeconv.config import WhiteningConfig

__all__ = ["WhitenedLinear"]


class WhitenedLinear(WhitenedLayer, nn.Linear):
    """:class:`torch.nn.Linear` over whitened input features.

    ``y = (x - mean) D W^T + b``: mean and covariance are those of the features over all leading dimensions, and D
    approximates the inverse square root of the covariance. By default training computes D from each batch, with the
    gradient through it, and evaluation uses running averages of mean and D; there is no scale.

    Shapes: ``(*, in_features)`` -> ``(*, out_features)``, any number of leading dimensions.

    Args:
        whitening: settings of the whitening, ``None`` for the defaults. All other arguments are those of
            :class:`torch.nn.Linear`.

    Raises:
        ShapeError: the last dimension is not ``in_features``, or that is not positive.
        TypeError: x is not floating point.

    Source: Ye et al. 2020, section 3.5.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        whitening: WhiteningConfig | None = None,
    ) -> None:
        label = f"{type(self).__name__}({in_features}, {out_features})"
        check_at_least_one("in_features", in_features, label)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.whitening = Whitening(in_features, Window(), 1, whitening, device=device, dtype=dtype, label=label)

    def forward(self, input: Tensor) -> Tensor:  # torch's name for it, as calls by keyword need
        x = input
        if is_symbol(x):
            return as_leaf(self, x)
        own = self.weight  # read once: a parametrization computes it anew
        if not torch.jit.is_tracing():
            self._check(x, own.dtype)
        rows, whitening = x.reshape(-1, self.in_features), self.whitening
        if whitening.takes_own_root(rows):
            y = whitening.own_root(rows, own, self.bias)
            if y is not None:
                kind = x.device.type
                y = as_dtype(y, torch.get_autocast_dtype(kind) if autocasts(kind) else x.dtype)
                return y.reshape(*x.shape[:-1], self.out_features)
        weight, bias = self.whitened_parameters(rows, own)
        return F.linear(x, weight, bias)

    def _check(self, x: Tensor, dtype: torch.dtype) -> None:
        label = self.whitening.label
        check_floating(x, label, dtype)
        if x.dim() == 0:
            raise ShapeError(
                f"{label}: expected x of shape (*, {self.in_features}), got a scalar. Pass x.reshape(1, -1)."
            )
        check_channels(x, -1, self.in_features, f"(*, {self.in_features})", label)
