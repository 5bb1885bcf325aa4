"""Weight standardisation, for networks with group normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["StandardisedConv2d"]

_EPS = 1e-5  # of the paper, added to the standard deviation


class StandardisedConv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d` whose weight is standardised for every output channel, in training and evaluation.

    ``y = conv(x, (w - mean) / (sd + 1e-5)) + b``, mean and standard deviation of each output channel's weights, with
    the gradient through both. Shapes, arguments and errors are those of :class:`torch.nn.Conv2d`.

    Source: Qiao et al., Micro-Batch Training with Batch-Channel Normalization and Weight Standardization,
    arXiv 1903.10520, eq. 5.
    """

    def standardised_weight(self) -> Tensor:
        """The weight of the plain convolution that this one is."""
        rows = self.weight.flatten(1).to(torch.promote_types(self.weight.dtype, torch.float32))
        var, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
        # the square root's slope is infinite at 0: a channel of equal weights, or with a single one
        sd = (var + _EPS**2).sqrt()
        return ((rows - mean) / (sd + _EPS)).view_as(self.weight).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.standardised_weight(), self.bias)
