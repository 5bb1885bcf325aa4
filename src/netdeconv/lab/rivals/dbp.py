"""Decorrelated backpropagation: in front of every layer a matrix that learns to decorrelate what the layer sees."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["DecorrelatedConv2d", "DecorrelatedLinear"]

# Of the paper's ImageNet trainings; its learning rate there lies between 1e-5 and 1e-4.
_STEP, _KAPPA, _SHARE = 1e-5, 0.5, 0.1


class _Decorrelated(nn.Module):
    """What the layers share: the matrix R, and how it learns.

    ``y = W (R x) + b``, run as one layer with the weight ``W R``. R is no parameter: it starts as the identity, and
    every training step takes it against the correlations of ``z = R x``:
    ``R <- R - step ((1 - kappa) C + kappa V) R``, C the mean of z z^T without its diagonal, V the diagonal of the mean
    of z^2, less 1.
    """

    decorrelation: Tensor
    weight: Tensor
    in_groups: int
    step: float
    kappa: float
    share: float

    def _set_up(self, size: int, step: float, kappa: float, share: float) -> None:
        self.step, self.kappa, self.share = step, kappa, share
        one = torch.eye(size, dtype=self.weight.dtype, device=self.weight.device)
        self.register_buffer("decorrelation", one.repeat(self.in_groups, 1, 1))

    def _patches(self, x: Tensor) -> Tensor:
        """What the layer sees, ``(groups, rows, size)``, of a part of the batch."""
        raise NotImplementedError

    def folded_weight(self, x: Tensor | None = None) -> Tensor:
        """The weight of the plain layer that this one is; first R learns from the batch x, if there is one."""
        kept = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(self.weight.device.type, enabled=False):
            r = self.decorrelation.to(kept)
            if x is not None:
                with torch.no_grad():
                    r = self._learned(r, self._patches(x).to(kept))
                    self.decorrelation.copy_(r)  # r itself is kept for backward
            rows = self.weight.to(kept).reshape(self.in_groups, -1, r.shape[2])
            return torch.bmm(rows, r).view_as(self.weight).to(self.weight.dtype)

    def _learned(self, r: Tensor, patches: Tensor) -> Tensor:
        """R after one step; C R is never formed, Z^T (Z R) is cheaper where there are fewer rows than columns."""
        z = patches @ r.mT
        power = z.square().mean(1)[..., None]
        correlated = z.mT @ (z @ r) / max(1, z.shape[1]) - power * r
        return r - self.step * ((1 - self.kappa) * correlated + self.kappa * (power - 1) * r)

    def _part(self, rows: Tensor) -> Tensor:
        """The first tenth of the batch, one row at least: batches are shuffled."""
        return rows[: math.ceil(self.share * len(rows))]

    def _has_news(self, x: Tensor) -> Tensor | None:
        return x.detach() if self.training and x.numel() else None


class DecorrelatedConv2d(_Decorrelated, nn.Conv2d):
    """:class:`torch.nn.Conv2d` behind a learned decorrelation of its patches, of the channels of a group.

    Training: R learns from the patches of a tenth of the images, without a gradient, before it is used. Evaluation: R
    stays, and the layer is the plain one with :meth:`folded_weight`.

    Shapes: as :class:`torch.nn.Conv2d`, with the batch dimension. R is updated in float32 at least.

    Args:
        step: length of R's steps.
        kappa: 0 for decorrelation alone, 1 for equal variances alone.
        share: of the images that R learns from. All other arguments are those of :class:`torch.nn.Conv2d`.

    Source: Dalm et al., Efficient Deep Learning with Decorrelated Backpropagation, arXiv 2405.02385.
    """

    def __init__(
        self, *args: Any, step: float = _STEP, kappa: float = _KAPPA, share: float = _SHARE, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.in_groups = self.groups
        self._set_up(self.weight[0].numel(), step, kappa, share)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"DecorrelatedConv2d: expected x of shape (N, C, H, W), got {tuple(x.shape)}.")
        return self._conv_forward(x, self.folded_weight(self._has_news(x)), self.bias)

    def _patches(self, x: Tensor) -> Tensor:
        part = self._part(x)
        pads = self._reversed_padding_repeated_twice
        part = F.pad(part, pads, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        rows = F.unfold(part, self.kernel_size, self.dilation, 0, self.stride)
        return rows.unflatten(1, (self.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


class DecorrelatedLinear(_Decorrelated, nn.Linear):
    """:class:`torch.nn.Linear` behind a learned decorrelation of its input; see :class:`DecorrelatedConv2d`."""

    in_groups = 1

    def __init__(
        self, *args: Any, step: float = _STEP, kappa: float = _KAPPA, share: float = _SHARE, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._set_up(self.in_features, step, kappa, share)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.folded_weight(self._has_news(x)), self.bias)

    def _patches(self, x: Tensor) -> Tensor:
        return self._part(x.reshape(-1, self.in_features))[None]
