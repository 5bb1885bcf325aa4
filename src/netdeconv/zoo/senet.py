"""SENet for 32x32 images: pre-activation ResNet whose blocks weigh their channels."""

from __future__ import annotations

from torch import Tensor

from netdeconv.zoo.blocks import SqueezeExcitation, Stage, StagedNetwork, scaled
from netdeconv.zoo.preact_resnet import PreActBlock

__all__ = ["SENet", "senet18"]


class _Block(PreActBlock):
    """A pre-activation block with squeeze and excitation after the convolutions."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.excitation = SqueezeExcitation(out_channels)

    def branch(self, x: Tensor) -> Tensor:
        """The two convolutions, and the weighing of their channels."""
        out: Tensor = self.excitation(super().branch(x))
        return out


class SENet(StagedNetwork):
    """A 3x3 stem and four stages of blocks with squeeze and excitation.

    Shapes: ``(N, 3, H, W)``, H and W at least 8 -> ``(N, num_classes)``.

    Args:
        blocks: residual blocks of each stage.
        num_classes: outputs.
        width: factor on the number of channels, 1 as published.

    Source: Hu et al. 2018; the 32x32 version of Ye et al. 2020, table 1.
    """

    def __init__(self, blocks: tuple[int, ...], num_classes: int = 10, width: float = 1.0) -> None:
        stages = [
            Stage(_Block, scaled(64 * 2**index, width), count, stride=2 if index else 1)
            for index, count in enumerate(blocks)
        ]
        super().__init__(scaled(64, width), stages, num_classes)


def senet18(num_classes: int = 10, width: float = 1.0) -> SENet:
    """SENet with 18 layers, the paper's SENet-18."""
    return SENet((2, 2, 2, 2), num_classes, width)
