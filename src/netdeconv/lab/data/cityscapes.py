"""Cityscapes, and anything in its layout: street scenes with a class for every pixel."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from netdeconv import ConfigError
from netdeconv.lab.data.file_batches import FileBatches
from netdeconv.lab.data.files import opened
from netdeconv.lab.data.folder import IMAGENET_MEAN, IMAGENET_SD
from netdeconv.lab.data.root import data_root

__all__ = ["CityscapesData", "train_ids"]

_IGNORED = 255
_HINT = (
    "Expected leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and gtFine/{train,val}/CITY/*_gtFine_labelIds.png, from "
    "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip (cityscapes-dataset.com, after registration): "
    "unzip both in that folder"
)


class CityscapesData(LightningDataModule):
    """Cityscapes: 2,975 training and 500 validation images of streets, 19 classes; all else is ignored (label 255).

    Read from ``leftImg8bit`` and ``gtFine`` in ``root`` or in ``root/cityscapes``. Training images are resized at
    random, cut out and mirrored, image and labels alike, as in the paper's code; evaluation takes the whole image, with
    its shorter side resized, one at a time. Standardised by ImageNet's mean and deviation.
    """

    task: Literal["segmentation"] = "segmentation"
    num_classes: int = 19
    in_channels: int = 3
    ignore_index: int = _IGNORED

    def __init__(
        self,
        *,
        root: Path | None = None,
        batch_size: int = 8,
        seed: int = 0,
        num_workers: int = 2,
        image_size: int = 480,
        base_size: int = 520,
        scale: tuple[float, float] = (0.5, 2.0),
        test_split: Literal["val", "test"] = "val",
        strict: bool = False,
    ) -> None:
        """
        Args:
            root: folder that holds leftImg8bit and gtFine; without one, the environment variable NETDECONV_DATA.
            batch_size: of the training batches in one process.
            seed: order and augmentation of the training images.
            num_workers: processes that read images.
            image_size: side of the squares that training images are cut to; smaller images get a black border.
            base_size: shorter side of the images in evaluation.
            scale: smallest and largest shorter side of training images before cutting, in base sizes.
            test_split: what the test loader holds; the labels of Cityscapes' own test part are not public.
            strict: stop at an image file that cannot be read, rather than leave it out and name it.
        """
        super().__init__()
        if not 0 < scale[0] <= scale[1]:
            raise ConfigError(f"expected a scale of two numbers above 0, the smaller first, got {scale}")
        if image_size < 1 or round(base_size * scale[0]) < 1:
            raise ConfigError(f"expected sizes of at least 1, got image_size {image_size}, base_size {base_size}")
        self.root = root
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.image_size = image_size
        self.base_size = base_size
        self.scale = scale
        self.test_split = test_split
        self.strict = strict
        self.parts: dict[str, _Scenes] = {}

    def setup(self, stage: str | None = None) -> None:
        """List the files.

        Raises:
            ConfigError: folders are missing or empty.
        """
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        if self.parts:
            return
        root = data_root(self.root)
        folder = next((p for p in (root, root / "cityscapes") if (p / "leftImg8bit").is_dir()), root)
        finish = v2.Compose(
            [
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                v2.Normalize(IMAGENET_MEAN, IMAGENET_SD),
                v2.ToPureTensor(),
            ]
        )
        shortest, longest = (round(self.base_size * factor) for factor in self.scale)
        black_and_ignored = {tv_tensors.Image: 0, tv_tensors.Mask: _IGNORED}
        training = v2.Compose(
            [
                v2.RandomResize(shortest, longest + 1, antialias=True),
                v2.RandomCrop(self.image_size, pad_if_needed=True, fill=black_and_ignored),
                v2.RandomHorizontalFlip(),
                finish,
            ]
        )
        evaluation = v2.Compose([v2.Resize(self.base_size, antialias=True), finish])
        parts = {"train": _Scenes(folder, "train", training)}
        for split in {"val", self.test_split}:
            parts[split] = _Scenes(folder, split, evaluation)
        self.parts = parts

    def train_dataloader(self) -> FileBatches:
        return self._batches("train", self.batch_size, self.seed)

    def val_dataloader(self) -> FileBatches:
        return self._batches("val", 1, None)

    def test_dataloader(self) -> FileBatches:
        return self._batches(self.test_split, 1, None)

    def _batches(self, part: str, batch_size: int, seed: int | None) -> FileBatches:
        return FileBatches(
            self.parts[part], batch_size=batch_size, seed=seed, num_workers=self.num_workers, strict=self.strict
        )


@functools.cache
def train_ids() -> Tensor:
    """From Cityscapes' label ids to the 19 classes that are trained and evaluated, 0 to 18, and 255 for all else.

    Returns:
        ``(256,)`` in uint8. torchvision's table, which is that of ``cityscapesscripts/helpers/labels.py``.
    """
    from torchvision.datasets import Cityscapes

    table = torch.full((256,), _IGNORED, dtype=torch.uint8)
    for kind in Cityscapes.classes:
        if kind.id >= 0 and not kind.ignore_in_eval:
            table[kind.id] = kind.train_id
    return table


class _Scenes:
    """The images and label images of one part, opened one by one."""

    def __init__(self, root: Path, split: str, transform: Any) -> None:
        from torchvision.datasets import Cityscapes

        for kind in ("leftImg8bit", "gtFine"):
            if not (root / kind / split).is_dir():
                raise ConfigError(f"expected {root / kind / split}, which is not there. {_HINT}")
        listed = Cityscapes(str(root), split=split, mode="fine", target_type="semantic")
        # Sorted: torchvision lists files in the order of the disk, which another machine would not repeat.
        pairs = sorted((image, label) for image, (label, *_) in zip(listed.images, listed.targets, strict=True))
        self.images, self.labels = [image for image, _ in pairs], [label for _, label in pairs]
        if not self.images:
            raise ConfigError(f"expected images in {root / 'leftImg8bit' / split}, found none. {_HINT}")
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from PIL import Image
        from torchvision import tv_tensors

        image = tv_tensors.Image(opened(self.images[index]))
        with Image.open(self.labels[index]) as file:
            ids = torch.from_numpy(np.array(file))
        if ids.dtype != torch.uint8 or ids.shape != image.shape[1:]:
            raise ValueError(f"{tuple(image.shape[1:])} pixels with labels {tuple(ids.shape)} of {ids.dtype}")
        pixels, labels = self.transform(image, tv_tensors.Mask(train_ids()[ids.long()]))
        return pixels, labels.long()

    def path(self, index: int) -> str:
        return self.images[index]
