"""Folders of images, one folder for each class: any of them, and ImageNet."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from netdeconv import ConfigError
from netdeconv.lab.data.file_batches import FileBatches
from netdeconv.lab.data.files import class_folders, opened
from netdeconv.lab.data.root import data_root

__all__ = ["IMAGENET_MEAN", "IMAGENET_SD", "ImageFolderData", "ImageNetData"]

# Of ImageNet's training images, red, green, blue; the values that torchvision's pretrained networks expect.
IMAGENET_MEAN, IMAGENET_SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageFolderData(LightningDataModule):
    """Any images for classification: ``root/train/CLASS/*`` and ``root/val/CLASS/*``, and ``root/test/CLASS/*``.

    The names of the folders in ``train``, sorted, are the classes. One of ``val`` and ``test`` may be missing and is
    then the same as the other. A training image is a random part of 8 to 100 % of the area, resized to a square and
    mirrored with probability one half; in evaluation, the shorter side is resized and the middle cut out. Images become
    RGB, standardised by ImageNet's mean and deviation.
    """

    task: Literal["classification"] = "classification"
    in_channels: int = 3
    _below: tuple[str, ...] = ()
    _hint = "Expected root/train/CLASS/* and root/val/CLASS/*, one folder of images for each class"

    def __init__(
        self,
        *,
        root: Path | None = None,
        batch_size: int = 256,
        seed: int = 0,
        num_workers: int = 2,
        image_size: int = 224,
        resize: int | None = None,
        strict: bool = False,
    ) -> None:
        """
        Args:
            root: folder that holds train and val; without one, the environment variable NETDECONV_DATA.
            batch_size: in one process, in training and evaluation.
            seed: order and augmentation of the training images.
            num_workers: processes that read images.
            image_size: side of the images as the network gets them.
            resize: shorter side before the middle is cut out, in evaluation; without one, 256 for an image_size of 224,
                and in proportion.
            strict: stop at an image file that cannot be read, rather than leave it out and name it.
        """
        super().__init__()
        self.root = root
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.image_size = image_size
        self.resize = round(image_size * 256 / 224) if resize is None else resize
        self.strict = strict
        if not 0 < self.image_size <= self.resize:
            raise ConfigError(
                f"expected an image_size from 1 to resize, got image_size {self.image_size} and resize {self.resize}"
            )
        self.parts: dict[str, _ClassFolders] = {}

    @property
    def num_classes(self) -> int:
        """Number of folders in ``train``; read from the disk."""
        return len(self._train.classes)

    def setup(self, stage: str | None = None) -> None:
        """List the files.

        Raises:
            ConfigError: a folder is missing or empty, or evaluation has a class that training has not.
        """
        from torchvision.transforms import v2

        if self.parts:
            return
        finish = [
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_SD),
        ]
        crop = v2.RandomResizedCrop(self.image_size, antialias=True)
        training = v2.Compose([crop, v2.RandomHorizontalFlip(), *finish])
        middle = [v2.Resize(self.resize, antialias=True), v2.CenterCrop(self.image_size)]
        evaluation = v2.Compose([*middle, *finish])
        order = self._train.class_to_idx
        parts = {"train": _ClassFolders(self._train, training, order)}
        for part, otherwise in (("val", "test"), ("test", "val")):
            name = part if (self._folder / part).is_dir() or not (self._folder / otherwise).is_dir() else otherwise
            parts[part] = _ClassFolders(class_folders(self._folder / name, hint=self._hint), evaluation, order)
        self.parts = parts

    def train_dataloader(self) -> FileBatches:
        return self._batches("train", self.seed)

    def val_dataloader(self) -> FileBatches:
        return self._batches("val", None)

    def test_dataloader(self) -> FileBatches:
        return self._batches("test", None)

    def _batches(self, part: str, seed: int | None) -> FileBatches:
        return FileBatches(
            self.parts[part],
            batch_size=self.batch_size,
            seed=seed,
            num_workers=self.num_workers,
            strict=self.strict,
        )

    @functools.cached_property
    def _folder(self) -> Path:
        root = data_root(self.root)
        places = [root, *(root / name for name in self._below)]
        return next((place for place in places if (place / "train").is_dir()), places[-1])

    @functools.cached_property
    def _train(self) -> Any:
        return class_folders(self._folder / "train", hint=self._hint)


class ImageNetData(ImageFolderData):
    """ImageNet (ILSVRC 2012): 1,281,167 training and 50,000 validation images in 1,000 classes.

    Read from ``train/CLASS/*`` and ``val/CLASS/*`` in ``root`` or in ``root/imagenet``, as torchvision unpacks the
    archives. Training images are cut out at random and mirrored, evaluation takes the middle, as in the paper's code.
    """

    _below = ("imagenet",)
    _hint = (
        "Expected ImageNet's train/CLASS/* and val/CLASS/*. With the archives from image-net.org in FOLDER, unpack "
        'them with  python -c "from torchvision.datasets import ImageNet; '
        "[ImageNet('FOLDER', s) for s in ('train', 'val')]\""
    )


class _ClassFolders:
    """The images of one part, opened one by one."""

    def __init__(self, listed: Any, transform: Any, order: dict[str, int]) -> None:
        unknown = sorted(set(listed.classes) - set(order))
        if unknown:
            raise ConfigError(
                f"expected the classes of the training part in {listed.root}, "
                f"got {len(unknown)} others: {', '.join(unknown[:3])}"
            )
        self.samples = [(path, order[listed.classes[label]]) for path, label in listed.samples]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return self.transform(opened(path)), label

    def path(self, index: int) -> str:
        return self.samples[index][0]
