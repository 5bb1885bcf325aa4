"""CIFAR-10 in memory, with the paper's augmentation applied to whole batches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn import functional as F

from netdeconv import ConfigError
from netdeconv.lab.data import TensorBatches

__all__ = ["CIFAR10Data", "data_root"]

# Of the training images, per channel; the values of the paper's code.
_MEAN, _SD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
_PAD = 4


def data_root() -> Path:
    """The folder with the data sets, from the environment variable ``NETDECONV_DATA``.

    Raises:
        ConfigError: the variable is not set, or leads nowhere.
    """
    value = os.environ.get("NETDECONV_DATA")
    if not value or not Path(value).is_dir():
        raise ConfigError(
            f"expected the folder with the data sets in the environment variable NETDECONV_DATA, got {value!r}. "
            "Set it to where torchvision.datasets.CIFAR10(root, download=True) has put the data"
        )
    return Path(value)


class CIFAR10Data(LightningDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images of 32x32 pixels in 10 classes.

    Read from ``root/cifar-10-batches-py`` (torchvision's layout) or ``root/cifar10-jpeg/{train,test}/CLASS/*``.
    Training images are shifted by up to 4 pixels, zeros moving in, and mirrored with probability one half; the
    last, smaller batch is kept. The evaluation loader holds the test images.

    Args:
        root: folder of the data sets.
        batch_size: of the training batches.
        shuffle_seed: order of the training batches, shifts and mirroring.
    """

    classes = 10

    def __init__(self, root: Path, batch_size: int = 128, *, shuffle_seed: int = 0) -> None:
        super().__init__()
        self.root = root
        self.batch_size = batch_size
        self.shuffle_seed = shuffle_seed
        self.parts: dict[str, tuple[Tensor, Tensor]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Load everything into memory, about 180 MB; takes some seconds."""
        if not self.parts:
            self.parts = {part: _load(self.root, part == "train") for part in ("train", "test")}

    def train_dataloader(self) -> AugmentedBatches:
        return AugmentedBatches(*self.parts["train"], batch_size=self.batch_size, shuffle_seed=self.shuffle_seed)

    def val_dataloader(self) -> Evaluation:
        return Evaluation(*self.parts["test"], batch_size=500)


class AugmentedBatches:
    """Shuffled batches of standardised images, shifted and mirrored one by one but computed together."""

    def __init__(self, images: Tensor, labels: Tensor, *, batch_size: int, shuffle_seed: int) -> None:
        self.batches = TensorBatches(images, labels, batch_size=batch_size, shuffle_seed=shuffle_seed)
        self.generator = torch.Generator().manual_seed(shuffle_seed + 1)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.batches:
            yield augmented(standardised(images), self.generator), labels


class Evaluation:
    """Batches of standardised images in their order."""

    def __init__(self, images: Tensor, labels: Tensor, *, batch_size: int) -> None:
        self.batches = TensorBatches(images, labels, batch_size=batch_size)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.batches:
            yield standardised(images), labels


def standardised(images: Tensor) -> Tensor:
    """8-bit images ``(N, 3, H, W)`` to floats of mean 0 and deviation 1 over the training set."""
    mean, sd = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _SD))
    return (images.float() / 255 - mean) / sd


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image shifted by up to 4 pixels each way and mirrored or not, at random. Shapes: ``(N, C, H, W)``."""
    count, _, height, width = images.shape
    rows, columns = (
        torch.randint(2 * _PAD + 1, (count, 1), generator=generator) + torch.arange(length)
        for length in (height, width)
    )
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(images, (_PAD,) * 4).movedim(1, -1)
    picked = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.movedim(-1, 1).contiguous()


def _load(root: Path, train: bool) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import CIFAR10, ImageFolder

    if (root / "cifar-10-batches-py").is_dir():
        official: Any = CIFAR10(root, train=train)
        return torch.from_numpy(official.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(official.targets)
    folder = root / "cifar10-jpeg" / ("train" if train else "test")
    if not folder.is_dir():
        raise ConfigError(f"expected CIFAR-10 in {root}, as cifar-10-batches-py or cifar10-jpeg, found neither")
    listed = ImageFolder(str(folder))
    images = np.stack([np.asarray(image) for image, _ in listed])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(listed.targets)
