"""DenseNet for 32x32 images: every layer reads what all layers of its stage have put out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from netdeconv.zoo.blocks import scaled

__all__ = ["DenseNet", "densenet121"]


class _Layer(nn.Module):
    """A 1x1 and a 3x3 convolution, each after normalisation and ReLU; the result stands in front of the input."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return torch.cat([out, x], 1)


class _Transition(nn.Module):
    """Half the channels, half the map."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, in_channels // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    """A 3x3 stem and four dense stages, with a transition in front of all but the first.

    Shapes: ``(N, 3, H, W)``, H and W multiples of 8 -> ``(N, num_classes)``.

    Args:
        layers: dense layers of each stage.
        growth: channels that every layer adds.
        num_classes: outputs.
        width: factor on the growth, and so on all channels; 1 as published.

    Source: Huang et al. 2017; the 32x32 version of Ye et al. 2020, table 1.
    """

    def __init__(self, layers: tuple[int, ...], growth: int, num_classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        growth = scaled(growth, width)
        channels = 2 * growth
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.stages = nn.Sequential()
        for index, count in enumerate(layers):
            parts: list[nn.Module] = []
            if index > 0:
                parts.append(_Transition(channels))
                channels //= 2
            for _ in range(count):
                parts.append(_Layer(channels, growth))
                channels += growth
            self.stages.append(nn.Sequential(*parts))
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn(self.stages(self.conv1(x))))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


def densenet121(num_classes: int = 10, width: float = 1.0) -> DenseNet:
    """DenseNet with 121 layers and growth 32, the paper's DenseNet-121."""
    return DenseNet((6, 12, 24, 16), 32, num_classes, width)
