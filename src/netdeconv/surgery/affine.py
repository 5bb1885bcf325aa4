"""What is left of a batch norm whose statistics are fixed: a scale and a shift per channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from netdeconv.errors import ShapeError
from netdeconv.functional.precision import exact

__all__ = ["ChannelAffine", "scale_and_shift"]


class ChannelAffine(nn.Module):
    """``y = weight * x + bias`` per channel: the same in training and evaluation, no statistics.

    Shapes: ``(N, C, *)`` -> the same; weight and bias ``(C,)``, both parameters.

    Raises:
        ShapeError: x does not have C channels.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        channels = self.weight.numel()
        if x.dim() < 2 or x.shape[1] != channels:
            raise ShapeError(f"ChannelAffine: expected x of shape (N, {channels}, *), got {tuple(x.shape)}.")
        shape = (1, -1, *[1] * (x.dim() - 2))
        return x * self.weight.reshape(shape).to(x.dtype) + self.bias.reshape(shape).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}"


def scale_and_shift(norm: Any) -> tuple[Tensor, Tensor] | None:
    """Scale and shift in float64 that a batch norm applies in evaluation; ``None`` without remembered statistics.

    ``scale = weight / sqrt(running_var + eps)``, ``shift = bias - scale * running_mean``.
    """
    if norm.running_mean is None or norm.running_var is None:
        return None
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    scale = torch.rsqrt(exact(norm.running_var.detach()) + getattr(norm, "eps", 0.0))
    if weight is not None:
        scale = scale * exact(weight.detach())
    shift = -scale * exact(norm.running_mean.detach())
    return scale, shift if bias is None else shift + exact(bias.detach())
