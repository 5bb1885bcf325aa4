"""Parts that several networks share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Bottleneck", "SqueezeExcitation", "Stage", "StagedNetwork", "projection", "scaled"]


class StageLike(Protocol):
    """What a stage is to a network: blocks to be built for so many channels, and the channels they put out."""

    @property
    def channels(self) -> int: ...

    def build(self, in_channels: int) -> nn.Sequential: ...


@dataclasses.dataclass(frozen=True)
class Stage:
    """Blocks in a row, of which the first changes the channels and divides the map by the stride.

    Attributes:
        block: makes a block, ``block(in_channels, out_channels, stride)``.
        channels: put out by every block.
        blocks: their number.
        stride: of the first one.
    """

    block: Callable[[int, int, int], nn.Module]
    channels: int
    blocks: int
    stride: int

    def build(self, in_channels: int) -> nn.Sequential:
        """The blocks, with new weights."""
        first = self.block(in_channels, self.channels, self.stride)
        return nn.Sequential(first, *(self.block(self.channels, self.channels, 1) for _ in range(self.blocks - 1)))


class StagedNetwork(nn.Module):
    """A normalised stem, stages of blocks, and a linear layer on the mean of their map.

    Args:
        stem: channels of the first convolution.
        stages: in their order.
        num_classes: outputs.
        kernel_size: of the first convolution.
    """

    def __init__(self, stem: int, stages: Sequence[StageLike], num_classes: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, kernel_size, 1, kernel_size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        inputs = [stem, *(stage.channels for stage in stages)]
        self.stages = nn.Sequential(*(stage.build(channels) for stage, channels in zip(stages, inputs, strict=False)))
        self.linear = nn.Linear(inputs[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))
        return logits

    def features(self, x: Tensor) -> Tensor:
        """The map after the last stage."""
        out: Tensor = self.stages(F.relu(self.bn1(self.conv1(x))))
        return out


class Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1 ones, each normalised, with ReLU between them.

    Subclasses say in ``forward`` what the result is added to.
    """

    def __init__(self, in_channels: int, channels: int, out_channels: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)

    def branch(self, x: Tensor) -> Tensor:
        """The three convolutions."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        normalised: Tensor = self.bn3(self.conv3(out))
        return normalised


class SqueezeExcitation(nn.Module):
    """Every channel times a number between 0 and 1, computed from the means of all channels.

    Source: Hu et al. 2018, with a sixteenth of the channels between the two layers.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        between = max(1, channels // 16)
        self.fc1 = nn.Conv2d(channels, between, 1)
        self.fc2 = nn.Conv2d(between, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))).sigmoid()


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """A shortcut: nothing where the shape stays, a normalised 1x1 convolution where it changes."""
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def scaled(channels: int, width: float) -> int:
    """The published number of channels times the width, at least one."""
    return max(1, round(channels * width))
