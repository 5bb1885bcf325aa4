"""Iterative normalisation: channels are whitened by a few Newton steps, behind the convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["IterNorm"]


class IterNorm(nn.Module):
    """Whitens groups of channels, then scales and shifts every channel; takes the place of a batch norm.

    ``y = weight * (D (x - mean)) + bias``, D from ``num_iters`` steps towards the inverse square root of the covariance
    plus ``eps`` I: divided by its trace t, ``P <- (3 P - P^3 cov / t) / 2`` from P = I, and ``D = P / sqrt(t)``.

    Training: mean and D are those of the batch, with the gradient through both; running values follow, as those of
    :class:`torch.nn.BatchNorm2d`. Evaluation: the running mean and the running D.

    Shapes: ``(N, C)`` or ``(N, C, ...)`` to the same. Statistics are computed in float32 at least.

    Args:
        num_features: channels C.
        group_size: most channels that are whitened together; the largest divisor of C up to it is taken.
        num_iters: Newton steps.
        eps: added to every variance.
        momentum: weight of a batch in the running values.

    Raises:
        ValueError: x has another number of channels, too few dimensions, or in training fewer than two values for each
            channel.

    Source: Huang et al., Iterative Normalization, CVPR 2019, algorithm 1.
    """

    running_mean: Tensor
    running_root: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        group_size: int = 64,
        num_iters: int = 5,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        size = next(n for n in range(min(group_size, num_features), 0, -1) if num_features % n == 0)
        self.num_features, self.group_size = num_features, size
        self.num_iters, self.eps, self.momentum = num_iters, eps, momentum
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(num_features, **made))
        self.bias = nn.Parameter(torch.zeros(num_features, **made))
        self.register_buffer("running_mean", torch.zeros(num_features, **made))
        roots = torch.eye(size, **made).repeat(num_features // size, 1, 1)
        self.register_buffer("running_root", roots)

    def forward(self, x: Tensor) -> Tensor:
        check_channels(self, x, self.num_features)
        rows, groups = channels_first(x), self.num_features // self.group_size
        if self.training:
            mean = rows.mean(1)
            centred = (rows - mean[:, None]).view(groups, self.group_size, rows.shape[1])
            root = self._root(centred)
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_root.lerp_(root.to(self.running_root.dtype), self.momentum)
        else:
            centred = (rows - self.running_mean.to(rows.dtype)[:, None]).view(groups, self.group_size, rows.shape[1])
            root = self.running_root.to(rows.dtype)
        scaled = root * self.weight.to(rows.dtype).view(groups, -1, 1)
        shift = self.bias.to(rows.dtype).view(groups, -1, 1)
        with torch.autocast(x.device.type, enabled=False):
            return channels_back(torch.baddbmm(shift, scaled, centred), x)

    def _root(self, centred: Tensor) -> Tensor:
        """``(groups, channels, rows)`` to one D for every group."""
        one = torch.eye(self.group_size, dtype=centred.dtype, device=centred.device)
        with torch.autocast(centred.device.type, enabled=False):
            cov = torch.baddbmm(one * self.eps, centred, centred.mT, alpha=1 / centred.shape[2])
            trace = cov.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
            p, cov = one.expand_as(cov), cov / trace
            for _ in range(self.num_iters):
                p = torch.baddbmm(p, torch.bmm(torch.bmm(p, p), p), cov, beta=1.5, alpha=-0.5)
            return p * trace.rsqrt()

    def extra_repr(self) -> str:
        return f"{self.num_features}, group_size={self.group_size}, num_iters={self.num_iters}, eps={self.eps}"


def check_channels(layer: nn.Module, x: Tensor, channels: int) -> None:
    """Refuse what cannot be normalised over its channels.

    Raises:
        ValueError: too few dimensions, another number of channels, or in training fewer than two values for each.
    """
    if x.dim() < 2 or x.shape[1] != channels:
        raise ValueError(
            f"{type(layer).__name__}: expected x of shape (N, {channels}) or (N, {channels}, ...), got "
            f"{tuple(x.shape)}. Pass num_features={x.shape[1] if x.dim() > 1 else '...'}, or a batch."
        )
    if layer.training and x.numel() < 2 * channels:
        raise ValueError(
            f"{type(layer).__name__}: expected more than 1 value per channel when training, got x of shape "
            f"{tuple(x.shape)}. Take a larger batch, or evaluation mode."
        )


def channels_first(x: Tensor) -> Tensor:
    """``(N, C, ...)`` to ``(C, rows)``, in float32 at least."""
    return x.transpose(0, 1).flatten(1).to(torch.promote_types(x.dtype, torch.float32))


def channels_back(rows: Tensor, like: Tensor) -> Tensor:
    """``(C, rows)``, in whatever grouping of C, to the shape, dtype and memory format of ``like``."""
    last = like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last)
    x = rows.view(like.shape[1], like.shape[0], *like.shape[2:]).transpose(0, 1).to(like.dtype)
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
