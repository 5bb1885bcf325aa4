"""Pre-activation ResNet for 32x32 images: normalisation and ReLU before every convolution."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from netdeconv.zoo.blocks import Stage, StagedNetwork, scaled

__all__ = ["PreActBlock", "PreActResNet", "preact_resnet18"]


class PreActBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which nothing follows."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        return self.branch(out) + (x if self.shortcut is None else self.shortcut(out))

    def branch(self, x: Tensor) -> Tensor:
        """The two convolutions, of an activated map."""
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(x))))
        return out


class PreActResNet(StagedNetwork):
    """A 3x3 stem and four stages of pre-activation blocks; no normalisation after the last one.

    The stem's batch norm, in front of that of the first block, is the authors': they create it and count it, but
    never call it. Here it is called, so that no parameter is idle; in the whitened network it is gone either way.

    Shapes: ``(N, 3, H, W)``, H and W at least 8 -> ``(N, num_classes)``.

    Args:
        blocks: residual blocks of each stage.
        num_classes: outputs.
        width: factor on the number of channels, 1 as published.

    Source: He et al. 2016, arXiv 1603.05027; the 32x32 version of Ye et al. 2020, table 1.
    """

    def __init__(self, blocks: tuple[int, ...], num_classes: int = 10, width: float = 1.0) -> None:
        stages = [
            Stage(PreActBlock, scaled(64 * 2**index, width), count, stride=2 if index else 1)
            for index, count in enumerate(blocks)
        ]
        super().__init__(scaled(64, width), stages, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """The map after the last stage."""
        out: Tensor = self.stages(self.bn1(self.conv1(x)))
        return out


def preact_resnet18(num_classes: int = 10, width: float = 1.0) -> PreActResNet:
    """Pre-activation ResNet with 18 layers, the paper's Preact-18."""
    return PreActResNet((2, 2, 2, 2), num_classes, width)
