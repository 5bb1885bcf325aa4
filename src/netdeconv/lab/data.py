"""Data sets as Lightning data modules, and the photographs that scikit-learn ships."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

__all__ = ["DigitsData", "TensorBatches", "photographs"]


class TensorBatches:
    """Batches of tensors that are already in memory; a plain loop costs far less than worker processes.

    Args:
        tensors: all of the same length, e.g. images and labels.
        batch_size: images in a batch; the last batch may be smaller.
        shuffle_seed: a new order in every pass, the same on every machine; ``None`` keeps the order.
    """

    def __init__(self, *tensors: Tensor, batch_size: int, shuffle_seed: int | None = None) -> None:
        self.tensors = tensors
        self.batch_size = batch_size
        self.generator = None if shuffle_seed is None else torch.Generator().manual_seed(shuffle_seed)

    def __len__(self) -> int:
        return -(-len(self.tensors[0]) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        count = len(self.tensors[0])
        order = torch.arange(count) if self.generator is None else torch.randperm(count, generator=self.generator)
        for chosen in order.split(self.batch_size):
            yield tuple(t[chosen] for t in self.tensors)


class DigitsData(LightningDataModule):
    """scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels in 10 classes (UCI, test part).

    Split into training, validation and test part, stratified by class and always the same for one
    ``split_seed``. Values are centred and scaled by the training part's mean and standard deviation. The
    evaluation loaders come as a pair, validation then test: a test accuracy can be logged after every epoch
    without ever being used to choose anything.

    Args:
        batch_size: of the training batches; evaluation takes a whole part at once.
        shuffle_seed: order of the training batches.
        split_seed: which images go to which part.
        validation, test: number of images in these parts; the rest is for training.
    """

    classes = 10
    channels = 1

    def __init__(
        self,
        batch_size: int = 64,
        *,
        shuffle_seed: int = 0,
        split_seed: int = 0,
        validation: int = 400,
        test: int = 400,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.shuffle_seed = shuffle_seed
        self.split_seed = split_seed
        self.sizes = (validation, test)
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
        for name, index in (("train", train_index), ("validation", val_index), ("test", test_index)):
            x = torch.from_numpy((images[index] - mean) / sd).unsqueeze(1)
            self.parts[name] = (x, torch.from_numpy(labels[index]).long())

    def train_dataloader(self) -> TensorBatches:
        return TensorBatches(*self.parts["train"], batch_size=self.batch_size, shuffle_seed=self.shuffle_seed)

    def val_dataloader(self) -> list[TensorBatches]:
        return [TensorBatches(*self.parts[p], batch_size=len(self.parts[p][1])) for p in ("validation", "test")]


def photographs() -> Tensor:
    """scikit-learn's two photographs (a temple, a flower), values 0 to 1.

    Returns:
        ``(2, 3, 427, 640)`` in float32.
    """
    from sklearn.datasets import load_sample_images

    images = np.stack(load_sample_images().images)
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
