"""ResNet for 32x32 images: normalisation after every convolution, as the paper trained it on CIFAR."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from netdeconv.zoo.blocks import Bottleneck, Stage, StagedNetwork, projection, scaled

__all__ = ["ResNet", "ResidualBottleneck", "resnet18", "resnet34", "resnet50"]


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResidualBottleneck(Bottleneck):
    """Three convolutions beside a shortcut; the one in the middle may have groups.

    Args:
        expansion: output channels for each channel of the 3x3 convolution.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, *, expansion: int = 4, groups: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels // expansion, out_channels, stride, groups)
        self.shortcut = projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


# Class of the block, and how many times the stage's channels it puts out.
_KINDS: dict[str, tuple[type[nn.Module], int]] = {"basic": (_Block, 1), "bottleneck": (ResidualBottleneck, 4)}


class ResNet(StagedNetwork):
    """A 3x3 stem and four stages of residual blocks; the map is halved from the second stage on.

    Shapes: ``(N, 3, H, W)``, H and W at least 8 -> ``(N, num_classes)``.

    Args:
        block: ``"basic"`` or ``"bottleneck"``.
        blocks: residual blocks of each stage.
        num_classes: outputs.
        width: factor on the number of channels, 1 as published.

    Source: He et al. 2016; parameter counts of the 32x32 version in Ye et al. 2020, table 1.
    """

    def __init__(self, block: str, blocks: tuple[int, ...], num_classes: int = 10, width: float = 1.0) -> None:
        kind, expansion = _KINDS[block]
        stages = [
            Stage(kind, scaled(64 * 2**index, width) * expansion, count, stride=2 if index else 1)
            for index, count in enumerate(blocks)
        ]
        super().__init__(scaled(64, width), stages, num_classes)


def resnet18(num_classes: int = 10, width: float = 1.0) -> ResNet:
    """ResNet with 18 layers, the paper's ResNet-18."""
    return ResNet("basic", (2, 2, 2, 2), num_classes, width)


def resnet34(num_classes: int = 10, width: float = 1.0) -> ResNet:
    """ResNet with 34 layers."""
    return ResNet("basic", (3, 4, 6, 3), num_classes, width)


def resnet50(num_classes: int = 10, width: float = 1.0) -> ResNet:
    """ResNet with 50 layers."""
    return ResNet("bottleneck", (3, 4, 6, 3), num_classes, width)
