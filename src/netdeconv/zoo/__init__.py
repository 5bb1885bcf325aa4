"""The paper's networks for 32x32 images, in plain ``torch.nn`` with batch normalisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from netdeconv.zoo.densenet import densenet121
from netdeconv.zoo.dpn import dpn92
from netdeconv.zoo.efficientnet import efficientnet_b0
from netdeconv.zoo.mobilenet import mobilenet_v2
from netdeconv.zoo.pnasnet import pnasnet_a
from netdeconv.zoo.preact_resnet import preact_resnet18
from netdeconv.zoo.resnet import resnet18, resnet34, resnet50
from netdeconv.zoo.resnext import resnext29_32x4d
from netdeconv.zoo.senet import senet18
from netdeconv.zoo.vgg import vgg11, vgg13, vgg16, vgg19

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = ["NETWORKS", "PUBLISHED_EXCLUDE", "create"]

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "vgg11": vgg11,
    "vgg13": vgg13,
    "vgg16": vgg16,
    "vgg19": vgg19,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "preact_resnet18": preact_resnet18,
    "densenet121": densenet121,
    "resnext29_32x4d": resnext29_32x4d,
    "mobilenet_v2": mobilenet_v2,
    "dpn92": dpn92,
    "pnasnet_a": pnasnet_a,
    "senet18": senet18,
    "efficientnet_b0": efficientnet_b0,
}
"""The networks by name; each takes ``num_classes`` and ``width``."""

PUBLISHED_EXCLUDE: dict[str, str] = {
    "efficientnet_b0": "stages",
    "torchvision:resnet18": "*.downsample.1",
    "torchvision:resnet50": "*.downsample.1",
}
"""What the authors' whitened networks left as it was, for ``exclude`` of :func:`netdeconv.convert`.

Their published numbers are those of networks with 50 batch norms (EfficientNet-B0 on CIFAR, of which only the
first and the last layer are whitened) and with 3 and 4 of them (ResNet-18 and -50 on ImageNet, in the shortcuts).
Other networks are whitened throughout.
"""


def create(name: str, num_classes: int = 10, width: float = 1.0) -> nn.Module:
    """A network by its name, one of :data:`NETWORKS`, with new random weights.

    Args:
        name: of the network.
        num_classes: outputs.
        width: factor on the number of channels, 1 as published.

    Raises:
        ValueError: no network of this name, or a number out of range.
    """
    if name not in NETWORKS:
        raise ValueError(f"zoo: expected a network out of {', '.join(sorted(NETWORKS))}, got {name!r}.")
    if num_classes < 1:
        raise ValueError(f"zoo: expected num_classes of at least 1, got {num_classes}. Pass the number of outputs.")
    if not width > 0:
        raise ValueError(f"zoo: expected width > 0, got {width}. It is a factor on the channels, 1 as published.")
    return NETWORKS[name](num_classes=num_classes, width=width)
