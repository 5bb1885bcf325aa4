"""ResNeXt for 32x32 images: bottleneck blocks whose 3x3 convolution has groups."""

from __future__ import annotations

from functools import partial

from netdeconv.zoo.blocks import Stage, StagedNetwork, scaled
from netdeconv.zoo.resnet import ResidualBottleneck

__all__ = ["ResNeXt", "resnext29_32x4d"]


class ResNeXt(StagedNetwork):
    """A 1x1 stem and three stages of grouped bottlenecks; the map is halved from the second stage on.

    Shapes: ``(N, 3, H, W)``, H and W at least 4 -> ``(N, num_classes)``.

    Args:
        blocks: residual blocks of each stage.
        groups: of every 3x3 convolution.
        group_width: channels of one group in the first stage; twice as many in every next one.
        num_classes: outputs.
        width: factor on the number of groups, and so on all channels; 1 as published.

    Source: Xie et al. 2017; the 32x32 version of Ye et al. 2020, table 1.
    """

    def __init__(
        self, blocks: tuple[int, ...], groups: int, group_width: int, num_classes: int = 10, width: float = 1.0
    ) -> None:
        groups = scaled(groups, width)
        block = partial(ResidualBottleneck, expansion=2, groups=groups)
        stages = [
            Stage(block, 2 * groups * group_width * 2**index, count, stride=2 if index else 1)
            for index, count in enumerate(blocks)
        ]
        super().__init__(scaled(64, width), stages, num_classes, kernel_size=1)


def resnext29_32x4d(num_classes: int = 10, width: float = 1.0) -> ResNeXt:
    """ResNeXt with 29 layers and 32 groups of 4 channels, the paper's ResNeXt-29."""
    return ResNeXt((3, 3, 3), 32, 4, num_classes, width)
