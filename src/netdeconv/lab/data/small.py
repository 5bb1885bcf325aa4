"""MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100: in memory, augmented in whole batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn import functional as F

from netdeconv import ConfigError
from netdeconv.lab.data import official
from netdeconv.lab.data.batches import Shifts, TensorBatches, standardised
from netdeconv.lab.data.files import read_class_folders
from netdeconv.lab.data.resumable import seeded
from netdeconv.lab.data.root import data_root

__all__ = ["CIFAR10Data", "CIFAR100Data", "FashionMNISTData", "MNISTData"]

_EVALUATION_BATCH = 500


class _SmallData(LightningDataModule):
    """Everything in memory as 8-bit images, standardised batch by batch."""

    task: Literal["classification"] = "classification"
    num_classes: int = 10
    in_channels: int = 3
    image_size: int = 32
    official_name: str
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    augment: Shifts | None = None

    def __init__(
        self,
        *,
        root: Path | None = None,
        batch_size: int = 128,
        seed: int = 0,
        download: bool = False,
        validation: int = 0,
    ) -> None:
        """
        Args:
            root: folder of the data sets; without one, the environment variable NETDECONV_DATA.
            batch_size: of the training batches in one process.
            seed: order and augmentation of the training images.
            download: get what is not there yet.
            validation: so many training images are set aside to choose by; with 0, as in the paper's code, the
                validation loader holds the test images.
        """
        super().__init__()
        self.root = root
        self.batch_size = batch_size
        self.seed = seed
        self.download = download
        self.validation = validation
        self.parts: dict[str, tuple[Tensor, Tensor]] = {}

    def prepare_data(self) -> None:
        """Download, where that was asked for; the trainer calls it in one process."""
        if self.download:
            official.fetch(self.official_name, data_root(self.root, make=True))

    def setup(self, stage: str | None = None) -> None:
        """Load everything into memory as 8-bit images; at most 180 MB and some seconds.

        Raises:
            ConfigError: the data are not there or cannot be read, or ``validation`` leaves nothing to train on.
        """
        if self.parts:
            return
        root = data_root(self.root)
        parts = {"train": self._load(root, train=True), "test": self._load(root, train=False)}
        images, labels = parts["train"]
        if not 0 <= self.validation < len(labels):
            raise ConfigError(f"expected a validation of 0 to {len(labels) - 1} images, got {self.validation}")
        if self.validation:
            order = torch.randperm(len(labels), generator=seeded(0))
            held_out, rest = order[: self.validation], order[self.validation :].sort().values
            parts["validation"] = images[held_out], labels[held_out]
            parts["train"] = images[rest], labels[rest]
        self.parts = parts

    def train_dataloader(self) -> TensorBatches:
        return TensorBatches(
            *self.parts["train"],
            batch_size=self.batch_size,
            seed=self.seed,
            augment=self.augment,
            prepare=self.standardised,
        )

    def val_dataloader(self) -> TensorBatches:
        return self._evaluation("validation" if self.validation else "test")

    def test_dataloader(self) -> TensorBatches:
        return self._evaluation("test")

    def standardised(self, images: Tensor) -> Tensor:
        """8-bit images ``(N, C, H, W)`` as a network gets them."""
        return standardised(images, self.mean, self.sd)

    def _evaluation(self, part: str) -> TensorBatches:
        return TensorBatches(*self.parts[part], batch_size=_EVALUATION_BATCH, prepare=self.standardised)

    def _load(self, root: Path, *, train: bool) -> tuple[Tensor, Tensor]:
        return official.read(self.official_name, root, train=train, classes=self.num_classes)


class _GreyData(_SmallData):
    """28x28 grey images in the middle of a black square."""

    in_channels = 1

    def __init__(self, *, image_size: int = 32, **options: Any) -> None:
        """
        Args:
            image_size: side of the images with their black border, from 28; 32 suits networks for 32x32 images.
        """
        if image_size < 28:
            raise ConfigError(f"expected an image_size of at least 28, got {image_size}")
        super().__init__(**options)
        self.image_size = image_size

    def _load(self, root: Path, *, train: bool) -> tuple[Tensor, Tensor]:
        images, labels = super()._load(root, train=train)
        height, width = (self.image_size - length for length in images.shape[-2:])
        return F.pad(images, (width // 2, width - width // 2, height // 2, height - height // 2)), labels


class MNISTData(_GreyData):
    """MNIST: 60,000 training and 10,000 test images of handwritten digits, 28x28 grey pixels, 10 classes.

    Read from ``root/MNIST/raw`` (torchvision's layout), set in black up to ``image_size``, not augmented, as in the
    paper's code; standardised by the training images' mean and deviation.
    """

    official_name = "MNIST"
    # Of the 28x28 training images, over 255, to four digits.
    mean, sd = (0.1307,), (0.3081,)


class FashionMNISTData(_GreyData):
    """Fashion-MNIST: 60,000 training and 10,000 test images of clothes, 28x28 grey pixels, 10 classes.

    Read from ``root/FashionMNIST/raw`` (torchvision's layout), set in black up to ``image_size``, not augmented, as in
    the paper's code; standardised by the training images' mean and deviation, which the paper's code leaves out.
    """

    official_name = "FashionMNIST"
    # Of the 28x28 training images, over 255, to four digits.
    mean, sd = (0.2860,), (0.3530,)


class CIFAR10Data(_SmallData):
    """CIFAR-10: 50,000 training and 10,000 test images of 32x32 pixels in 10 classes.

    Read from ``root/cifar-10-batches-py`` (torchvision's layout) or ``root/cifar10-jpeg/{train,test}/CLASS/*``.
    Training images are shifted by up to 4 pixels, black moving in, and mirrored with probability one half; the
    last, smaller batch is kept.
    """

    official_name = "CIFAR10"
    # Of the training images, per channel; the values of the paper's code.
    mean, sd = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    augment = Shifts(4)

    def __init__(self, *, strict: bool = False, **options: Any) -> None:
        """
        Args:
            strict: stop at an image file that cannot be read, rather than leave it out and name it.
        """
        super().__init__(**options)
        self.strict = strict

    def _load(self, root: Path, *, train: bool) -> tuple[Tensor, Tensor]:
        folder = root / "cifar10-jpeg"
        if not folder.is_dir() or official.folder("CIFAR10", root).is_dir():
            return official.read("CIFAR10", root, train=train, classes=self.num_classes, instead=str(folder))
        part = folder / ("train" if train else "test")
        images, labels, classes = read_class_folders(
            part, size=self.image_size, strict=self.strict, hint="Expected cifar10-jpeg/{train,test}/CLASS/*"
        )
        if classes != self.num_classes:
            raise ConfigError(f"expected {self.num_classes} folders with images in {part}, one a class, got {classes}")
        return images, labels


class CIFAR100Data(_SmallData):
    """CIFAR-100: 50,000 training and 10,000 test images of 32x32 pixels in 100 classes.

    Read from ``root/cifar-100-python`` (torchvision's layout). Training images are shifted by up to 4 pixels, black
    moving in, and mirrored with probability one half; the last, smaller batch is kept.
    """

    num_classes = 100
    official_name = "CIFAR100"
    # Of the training images, per channel; the values of the paper's code.
    mean, sd = (0.5071, 0.4865, 0.4409), (0.2009, 0.1984, 0.2023)
    augment = Shifts(4)
