"""ResNet for 32x32 images: normalisation after every convolution, as the paper trained it on CIFAR."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ResNet", "resnet18", "resnet34", "resnet50"]


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class _Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1 ones, beside a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.shortcut = _shortcut(in_channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


_KINDS: dict[str, type[_Block] | type[_Bottleneck]] = {"basic": _Block, "bottleneck": _Bottleneck}


class ResNet(nn.Module):
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
        super().__init__()
        kind = _KINDS[block]
        channels = max(1, round(64 * width))
        self.conv1 = nn.Conv2d(3, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        stages = []
        for stage, count in enumerate(blocks):
            wanted = max(1, round(64 * 2**stage * width))
            layers = []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                layers.append(kind(channels, wanted, stride))
                channels = wanted * kind.expansion
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.stages(F.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


def _shortcut(in_channels: int, out: int, stride: int) -> nn.Sequential:
    if stride == 1 and in_channels == out:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(in_channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))


def resnet18(num_classes: int = 10, width: float = 1.0) -> ResNet:
    """ResNet with 18 layers, the paper's ResNet-18."""
    return ResNet("basic", (2, 2, 2, 2), num_classes, width)


def resnet34(num_classes: int = 10, width: float = 1.0) -> ResNet:
    """ResNet with 34 layers."""
    return ResNet("basic", (3, 4, 6, 3), num_classes, width)


def resnet50(num_classes: int = 10, width: float = 1.0) -> ResNet:
    """ResNet with 50 layers."""
    return ResNet("bottleneck", (3, 4, 6, 3), num_classes, width)
