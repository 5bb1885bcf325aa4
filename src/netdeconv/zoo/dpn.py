"""Dual path network for 32x32 images: residual and dense connections side by side."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from netdeconv.zoo.blocks import Bottleneck, StagedNetwork, projection, scaled

__all__ = ["DPN", "dpn92"]


@dataclasses.dataclass(frozen=True)
class _Stage:
    """Dual path blocks in a row.

    Attributes:
        groups: of every 3x3 convolution.
        middle: channels of every 3x3 convolution.
        residual: channels of the residual path.
        dense: channels that every block adds to the dense path, the first one twice.
        blocks: their number.
        stride: of the first one.
    """

    groups: int
    middle: int
    residual: int
    dense: int
    blocks: int
    stride: int

    @property
    def channels(self) -> int:
        return self.residual + (self.blocks + 1) * self.dense

    def build(self, in_channels: int) -> nn.Sequential:
        inputs = (self.residual + (index + 1) * self.dense for index in range(1, self.blocks))
        return nn.Sequential(_Block(self, in_channels, first=True), *(_Block(self, channels) for channels in inputs))


class _Block(Bottleneck):
    """A grouped bottleneck; its first channels are added to the residual path, the others join the dense one.

    Args:
        stage: where it stands.
        in_channels: of the input.
        first: bring the input to the channels and the map of the output before, by a projection.
    """

    def __init__(self, stage: _Stage, in_channels: int, first: bool = False) -> None:
        out, stride = stage.residual + stage.dense, stage.stride if first else 1
        super().__init__(in_channels, stage.middle, out, stride, stage.groups)
        self.residual = stage.residual
        self.shortcut = projection(in_channels, out, stride) if first else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        out, beside, split = self.branch(x), self.shortcut(x), self.residual
        return F.relu(torch.cat([beside[:, :split] + out[:, :split], beside[:, split:], out[:, split:]], 1))


class DPN(StagedNetwork):
    """A 3x3 stem and four dual path stages; the map is halved from the second stage on.

    Shapes: ``(N, 3, H, W)``, H and W at least 8 -> ``(N, num_classes)``.

    Args:
        blocks: blocks of each stage.
        growth: channels that every block of a stage adds to the dense path.
        num_classes: outputs.
        width: factor on the number of channels and groups, 1 as published.

    Source: Chen et al. 2017; the 32x32 version of Ye et al. 2020, table 1.
    """

    def __init__(
        self, blocks: tuple[int, ...], growth: tuple[int, ...], num_classes: int = 10, width: float = 1.0
    ) -> None:
        groups = scaled(32, width)
        stages = [
            _Stage(
                groups=groups,
                middle=3 * groups * 2**index,
                residual=scaled(256 * 2**index, width),
                dense=scaled(dense, width),
                blocks=count,
                stride=2 if index else 1,
            )
            for index, (count, dense) in enumerate(zip(blocks, growth, strict=True))
        ]
        super().__init__(scaled(64, width), stages, num_classes)


def dpn92(num_classes: int = 10, width: float = 1.0) -> DPN:
    """Dual path network with 92 layers, the paper's DPN-92."""
    return DPN((3, 4, 20, 3), (16, 32, 24, 128), num_classes, width)
