"""PNASNet for 32x32 images, with the smaller of the two cells known for CIFAR."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from netdeconv.zoo.blocks import Stage, StagedNetwork, projection, scaled

__all__ = ["PNASNet", "pnasnet_a"]


class _CellA(nn.Module):
    """A 7x7 convolution of every channel by itself, beside a 3x3 pooling."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 7, stride, 3, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.pool = nn.MaxPool2d(3, stride, 1)
        self.shortcut = projection(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)) + self.shortcut(self.pool(x)))


class PNASNet(StagedNetwork):
    """A 3x3 stem and three stages of cells; the first cell of the second and third doubles channels, halves the map.

    Shapes: ``(N, 3, H, W)``, H and W at least 4 -> ``(N, num_classes)``.

    Args:
        cells: of each stage.
        channels: of the first stage.
        num_classes: outputs.
        width: factor on the number of channels, 1 as published.

    Source: Liu et al. 2018; the 32x32 version of Ye et al. 2020, table 1.
    """

    def __init__(self, cells: tuple[int, ...], channels: int, num_classes: int = 10, width: float = 1.0) -> None:
        channels = scaled(channels, width)
        stages = [
            Stage(_CellA, channels * 2**index, count, stride=2 if index else 1) for index, count in enumerate(cells)
        ]
        super().__init__(channels, stages, num_classes)


def pnasnet_a(num_classes: int = 10, width: float = 1.0) -> PNASNet:
    """The paper's PNASNetA: cell A, 44 channels, six cells at each of three sizes of the map and two between."""
    return PNASNet((6, 7, 7), 44, num_classes, width)
