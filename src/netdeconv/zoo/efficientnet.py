"""EfficientNet-B0 for 32x32 images, in the early version that the paper trained."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from netdeconv.zoo.blocks import SqueezeExcitation, Stage, StagedNetwork, scaled
from netdeconv.zoo.mobilenet import InvertedResidual

__all__ = ["EfficientNet", "efficientnet_b0"]

# Expansion, channels, blocks, stride.
_STAGES = ((1, 16, 1, 2), (6, 24, 2, 1), (6, 40, 2, 2), (6, 80, 3, 2), (6, 112, 3, 1), (6, 192, 4, 2), (6, 320, 1, 2))


class _Block(InvertedResidual):
    """An inverted residual block that weighs its output channels.

    Where the map is halved there is no shortcut, and the output as it was before the weighing is added instead.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, expansion: int) -> None:
        super().__init__(in_channels, out_channels, stride, expansion=expansion)
        self.excitation = SqueezeExcitation(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        weighed: Tensor = self.excitation(out)
        return weighed + (out if self.shortcut is None else self.shortcut(x))


class EfficientNet(StagedNetwork):
    """A 3x3 stem and seven stages of inverted residual blocks with squeeze and excitation.

    Shapes: ``(N, 3, H, W)``, H and W multiples of 32 -> ``(N, num_classes)``.

    Args:
        num_classes: outputs.
        width: factor on the number of channels, 1 as published.

    Source: Tan and Le 2019; the 32x32 version of Ye et al. 2020, table 1. Unlike the original it has 3x3 kernels
    and ReLU throughout, weighs channels after the last convolution of a block, and drops nothing out. In the paper
    only stem and linear layer are whitened; see :data:`netdeconv.zoo.PUBLISHED_EXCLUDE`.
    """

    def __init__(self, num_classes: int = 10, width: float = 1.0) -> None:
        stages = [
            Stage(partial(_Block, expansion=expansion), scaled(channels, width), blocks, stride)
            for expansion, channels, blocks, stride in _STAGES
        ]
        super().__init__(scaled(32, width), stages, num_classes)


def efficientnet_b0(num_classes: int = 10, width: float = 1.0) -> EfficientNet:
    """The paper's EfficientNet."""
    return EfficientNet(num_classes, width)
