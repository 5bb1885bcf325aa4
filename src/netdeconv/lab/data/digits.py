"""scikit-learn's handwritten digits, which need no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from netdeconv import ConfigError
from netdeconv.lab.data.batches import TensorBatches

__all__ = ["DigitsData"]

_COUNT, _SIZE = 1797, 8


class DigitsData(LightningDataModule):
    """scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels in 10 classes (UCI, test part).

    Split into training, validation and test part, stratified by class and always the same for one
    ``split_seed``. Values are centred and scaled by the training part's mean and standard deviation. The
    validation loaders come as a pair, validation then test: a test accuracy can be logged after every epoch
    without ever being used to choose anything.

    Args:
        root: not used; the images come with scikit-learn.
        batch_size: of the training batches; evaluation takes a whole part at once.
        seed: order of the training batches.
        split_seed: which images go to which part.
        validation: number of images for validation.
        test: number of images for testing; the rest is for training.
        image_size: a multiple of 8; each pixel becomes a square of them. 32 suits networks for 32x32 images.
    """

    task: Literal["classification"] = "classification"
    num_classes: int = 10
    in_channels: int = 1

    def __init__(
        self,
        *,
        root: Path | None = None,
        batch_size: int = 64,
        seed: int = 0,
        split_seed: int = 0,
        validation: int = 400,
        test: int = 400,
        image_size: int = _SIZE,
    ) -> None:
        super().__init__()
        if image_size < _SIZE or image_size % _SIZE:
            raise ConfigError(f"expected an image_size that is a multiple of {_SIZE}, got {image_size}")
        if min(validation, test, _COUNT - validation - test) < self.num_classes:
            raise ConfigError(
                f"expected {self.num_classes} images or more in each part of {_COUNT}, "
                f"got validation {validation} and test {test}"
            )
        self.batch_size = batch_size
        self.seed = seed
        self.split_seed = split_seed
        self.sizes = (validation, test)
        self.image_size = image_size
        self.parts: dict[str, tuple[Tensor, Tensor]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Load, split and scale; needs no network and takes a few milliseconds."""
        if self.parts:
            return
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits: Any = load_digits()
        images, labels = digits.images.astype(np.float32), digits.target
        validation, test = self.sizes
        rest, test_index = train_test_split(
            np.arange(len(labels)), test_size=test, stratify=labels, random_state=self.split_seed
        )
        train_index, val_index = train_test_split(
            rest, test_size=validation, stratify=labels[rest], random_state=self.split_seed
        )
        mean, sd = images[train_index].mean(), images[train_index].std()
        times = self.image_size // _SIZE
        for name, index in (("train", train_index), ("validation", val_index), ("test", test_index)):
            x = torch.from_numpy((images[index] - mean) / sd).unsqueeze(1)
            x = x.repeat_interleave(times, 2).repeat_interleave(times, 3)
            self.parts[name] = (x, torch.from_numpy(labels[index]).long())

    def train_dataloader(self) -> TensorBatches:
        return TensorBatches(*self.parts["train"], batch_size=self.batch_size, seed=self.seed)

    def val_dataloader(self) -> list[TensorBatches]:
        return [self._whole(part) for part in ("validation", "test")]

    def test_dataloader(self) -> TensorBatches:
        return self._whole("test")

    def _whole(self, part: str) -> TensorBatches:
        return TensorBatches(*self.parts[part], batch_size=len(self.parts[part][1]))
