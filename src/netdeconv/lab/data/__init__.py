"""Data sets as Lightning data modules, by name, and the photographs that scikit-learn ships."""

from __future__ import annotations

from netdeconv.lab.data.batches import TensorBatches, first_images
from netdeconv.lab.data.cityscapes import CityscapesData
from netdeconv.lab.data.digits import DigitsData
from netdeconv.lab.data.folder import ImageFolderData, ImageNetData
from netdeconv.lab.data.photographs import photographs
from netdeconv.lab.data.registry import DATASETS, create_data
from netdeconv.lab.data.root import data_root
from netdeconv.lab.data.small import CIFAR10Data, CIFAR100Data, FashionMNISTData, MNISTData

__all__ = [
    "DATASETS",
    "CIFAR10Data",
    "CIFAR100Data",
    "CityscapesData",
    "DigitsData",
    "FashionMNISTData",
    "ImageFolderData",
    "ImageNetData",
    "MNISTData",
    "TensorBatches",
    "create_data",
    "data_root",
    "first_images",
    "photographs",
]
