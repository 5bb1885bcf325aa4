"""Stochastic whitening batch normalisation: the whitening matrix is learned a little at every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from netdeconv.lab.rivals.iternorm import channels_back, channels_first, check_channels

__all__ = ["SWBN"]


class SWBN(nn.Module):
    """Standardises every channel, decorrelates them, then scales and shifts; takes the place of a batch norm.

    ``y = weight * (W s) + bias`` with s = (x - mean) / sqrt(var + eps). W is no parameter: it starts as the identity,
    and every training step takes it down the gradient of the distance of ``M = W S W^T`` from the identity, S the mean
    of s s^T: ``W <- W - step (M - I) W S / |M - I|`` for the Frobenius norm, ``W <- W - step (M - I) W`` for the
    Kullback-Leibler divergence; then it is made symmetric.

    Training: mean, variance and S are those of the batch, with the gradient through mean and variance and none through
    W; running values follow, as those of :class:`torch.nn.BatchNorm2d`. Evaluation: the running values and W as it is.

    Shapes: ``(N, C)`` or ``(N, C, ...)`` to the same. Statistics are computed in float32 at least.

    Args:
        num_features: channels C.
        criterion: ``"fro"`` or ``"kl"``.
        step: length of W's steps.
        eps: added to every variance.
        momentum: weight of a batch in the running values.

    Raises:
        ValueError: no such criterion; x has another number of channels, too few dimensions, or in training fewer than
            two values for each channel.

    Source: Zhang et al., Stochastic Whitening Batch Normalization, CVPR 2021, arXiv 2106.04413, eq. 3.
    """

    running_mean: Tensor
    running_var: Tensor
    whitener: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        criterion: str = "fro",
        step: float = 1e-5,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if criterion not in ("fro", "kl"):
            raise ValueError(f"SWBN: expected criterion 'fro' or 'kl', got {criterion!r}.")
        super().__init__()
        self.num_features, self.criterion, self.step, self.eps, self.momentum = (
            num_features, criterion, step, eps, momentum
        )  # fmt: skip
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(num_features, **made))
        self.bias = nn.Parameter(torch.zeros(num_features, **made))
        self.register_buffer("running_mean", torch.zeros(num_features, **made))
        self.register_buffer("running_var", torch.ones(num_features, **made))
        self.register_buffer("whitener", torch.eye(num_features, **made))

    def forward(self, x: Tensor) -> Tensor:
        check_channels(self, x, self.num_features)
        rows = channels_first(x)
        w = self.whitener.to(rows.dtype)
        with torch.autocast(x.device.type, enabled=False):
            if self.training:
                var, mean = torch.var_mean(rows, 1, correction=0)
                s = (rows - mean[:, None]) * (var + self.eps).rsqrt()[:, None]
                with torch.no_grad():
                    self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                    self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)
                    w = self._stepped(w, s)
                    self.whitener.copy_(w)  # w itself is kept for backward
            else:
                mean, var = self.running_mean.to(rows.dtype), self.running_var.to(rows.dtype)
                s = (rows - mean[:, None]) * (var + self.eps).rsqrt()[:, None]
            scaled = w * self.weight.to(rows.dtype)[:, None]
            return channels_back(torch.addmm(self.bias.to(rows.dtype)[:, None], scaled, s), x)

    def _stepped(self, w: Tensor, s: Tensor) -> Tensor:
        """W after one step on standardised ``(C, rows)``."""
        cov = s @ s.mT / s.shape[1]
        gap = w @ cov @ w.mT
        gap.diagonal().sub_(1)
        gradient = gap @ w
        if self.criterion == "fro":
            gradient = gradient @ cov / gap.norm().clamp_min(torch.finfo(gap.dtype).tiny)  # of C = 1 the gap may be 0
        w = w - self.step * gradient
        return (w + w.mT) / 2

    def extra_repr(self) -> str:
        return f"{self.num_features}, criterion={self.criterion!r}, step={self.step}, eps={self.eps}"
