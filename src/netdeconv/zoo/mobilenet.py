"""MobileNetV2 for 32x32 images: blocks that are wide inside and narrow between, with depthwise convolutions."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from netdeconv.zoo.blocks import Bottleneck, Stage, StagedNetwork, projection, scaled

__all__ = ["InvertedResidual", "MobileNetV2", "mobilenet_v2"]

# Expansion, channels, blocks, stride. The map is halved three times less than for ImageNet's 224x224.
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class _Head(nn.Sequential):
    """A normalised 1x1 convolution and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class InvertedResidual(Bottleneck):
    """A bottleneck with a wide depthwise middle; where it keeps the map, beside a shortcut.

    Args:
        expansion: channels of the middle for each channel of the input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, expansion: int) -> None:
        middle = expansion * in_channels
        super().__init__(in_channels, middle, out_channels, stride, groups=middle)
        self.shortcut = projection(in_channels, out_channels, stride) if stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        return out if self.shortcut is None else out + self.shortcut(x)


class MobileNetV2(StagedNetwork):
    """A 3x3 stem, seven stages of inverted residual blocks, and a 1x1 convolution.

    Shapes: ``(N, 3, H, W)``, H and W at least 8 -> ``(N, num_classes)``.

    Args:
        num_classes: outputs.
        width: factor on the number of channels, 1 as published.

    Source: Sandler et al. 2018; the 32x32 version of Ye et al. 2020, table 1, which has ReLU in place of ReLU6,
    and a projection where a block of stride 1 changes the channels.
    """

    def __init__(self, num_classes: int = 10, width: float = 1.0) -> None:
        stages = [
            Stage(partial(InvertedResidual, expansion=expansion), scaled(channels, width), blocks, stride)
            for expansion, channels, blocks, stride in _STAGES
        ]
        stages.append(Stage(_Head, scaled(1280, width), blocks=1, stride=1))
        super().__init__(scaled(32, width), stages, num_classes)


def mobilenet_v2(num_classes: int = 10, width: float = 1.0) -> MobileNetV2:
    """The paper's MobileNetV2."""
    return MobileNetV2(num_classes, width)
