"""VGG for 32x32 images: convolutions and one linear layer, as the paper trained it on CIFAR."""

from __future__ import annotations

from torch import Tensor, nn

from netdeconv.zoo.blocks import scaled

__all__ = ["VGG", "vgg11", "vgg13", "vgg16", "vgg19"]

# Convolutions per stage; every stage ends with a pooling that halves the map.
_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_CHANNELS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Stages of convolution, batch normalisation and ReLU; then one linear layer.

    Shapes: ``(N, 3, H, W)``, H and W multiples of 32 -> ``(N, num_classes)``.

    Args:
        depth: 11, 13, 16 or 19 layers.
        num_classes: outputs.
        width: factor on the number of channels, 1 as published.

    Source: Simonyan and Zisserman 2015; parameter counts of the 32x32 version in Ye et al. 2020, table 1.
    """

    def __init__(self, depth: int, num_classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for convs, wanted in zip(_STAGES[depth], _CHANNELS, strict=True):
            for _ in range(convs):
                out = scaled(wanted, width)
                layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
                channels = out
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.pool(self.features(x)).flatten(1))
        return logits


def vgg11(num_classes: int = 10, width: float = 1.0) -> VGG:
    """VGG with 11 layers."""
    return VGG(11, num_classes, width)


def vgg13(num_classes: int = 10, width: float = 1.0) -> VGG:
    """VGG with 13 layers."""
    return VGG(13, num_classes, width)


def vgg16(num_classes: int = 10, width: float = 1.0) -> VGG:
    """VGG with 16 layers, the paper's VGG-16."""
    return VGG(16, num_classes, width)


def vgg19(num_classes: int = 10, width: float = 1.0) -> VGG:
    """VGG with 19 layers."""
    return VGG(19, num_classes, width)
