"""The data sets by name."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule

from netdeconv import ConfigError
from netdeconv.lab.data.cityscapes import CityscapesData
from netdeconv.lab.data.digits import DigitsData
from netdeconv.lab.data.folder import ImageFolderData, ImageNetData
from netdeconv.lab.data.small import CIFAR10Data, CIFAR100Data, FashionMNISTData, MNISTData
from netdeconv.lab.names import nearest

__all__ = ["DATASETS", "create_data"]

DATASETS: dict[str, type[LightningDataModule]] = {
    "digits": DigitsData,
    "mnist": MNISTData,
    "fashion_mnist": FashionMNISTData,
    "cifar10": CIFAR10Data,
    "cifar100": CIFAR100Data,
    "imagenet": ImageNetData,
    "cityscapes": CityscapesData,
    "image_folder": ImageFolderData,
}


def create_data(name: str, **options: Any) -> LightningDataModule:
    """A data set's module.

    Args:
        name: one of ``DATASETS``.
        options: of its class.

    Raises:
        ConfigError: no data set has this name, or an option is wrong.
    """
    if name not in DATASETS:
        raise ConfigError(f"expected the name of a data set, got {name!r}. {nearest(name, DATASETS)}")
    return DATASETS[name](**options)
