"""The paper's networks for 32x32 images, in plain ``torch.nn`` with batch normalisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from netdeconv.zoo.resnet import resnet18, resnet34, resnet50
from netdeconv.zoo.vgg import vgg11, vgg13, vgg16, vgg19

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = ["NETWORKS", "create"]

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "vgg11": vgg11,
    "vgg13": vgg13,
    "vgg16": vgg16,
    "vgg19": vgg19,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
}


def create(name: str, num_classes: int = 10, width: float = 1.0) -> nn.Module:
    """A network by its name, one of :data:`NETWORKS`, with new random weights.

    Raises:
        ValueError: no network of this name.
    """
    if name not in NETWORKS:
        raise ValueError(f"zoo: expected a network out of {', '.join(sorted(NETWORKS))}, got {name!r}.")
    return NETWORKS[name](num_classes=num_classes, width=width)
