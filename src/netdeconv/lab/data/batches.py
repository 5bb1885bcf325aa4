"""Batches of images that are already in memory, shifted and mirrored one by one but computed together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from netdeconv.lab.data.resumable import ResumableBatches, seeded

__all__ = ["Shifts", "TensorBatches", "first_images", "standardised"]


class TensorBatches(ResumableBatches):
    """Batches of tensors in memory; a plain loop costs far less than worker processes.

    Args:
        tensors: all of the same length, e.g. images and labels.
        batch_size: images in a batch; the last batch may be smaller.
        seed: a new order and augmentation in every epoch, the same on every machine; ``None`` keeps the order.
        augment: changes the first tensor's part of a batch at random; only with a seed.
        prepare: applied to the first tensor's part of a batch, last.
    """

    def __init__(
        self,
        *tensors: Tensor,
        batch_size: int,
        seed: int | None = None,
        augment: Shifts | None = None,
        prepare: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(len(tensors[0]), batch_size=batch_size, seed=seed)
        self.tensors = tensors
        self.augment = augment
        self.prepare = prepare

    def batches(self, epoch: int, first: int) -> Iterator[tuple[Tensor, ...]]:
        for number, together, mine in self.chunks(epoch, first):
            images, *others = (t[together[mine]] for t in self.tensors)
            if self.augment is not None and self.seed is not None:
                # Drawn for all processes' images at once: what an image becomes does not depend on who has it.
                drawn = self.augment.draw(len(together), seeded(self.seed, epoch, number + 1))
                images = self.augment(images, drawn[mine])
            yield (images if self.prepare is None else self.prepare(images), *others)


class Shifts:
    """Shift every image by up to ``pad`` pixels each way, zeros moving in, and mirror it with probability one half.

    Args:
        pad: greatest shift.
    """

    def __init__(self, pad: int = 4) -> None:
        self.pad = pad

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """What happens to each image: ``(count, 3)``, the window's row and column, and 1 for mirrored."""
        corners = torch.randint(2 * self.pad + 1, (count, 2), generator=generator)
        return torch.cat([corners, torch.randint(2, (count, 1), generator=generator)], dim=1)

    def __call__(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Do so. Shapes: ``(N, C, H, W)`` and ``(N, 3)`` to ``(N, C, H, W)``."""
        count, _, height, width = images.shape
        rows, columns, mirrored = drawn.unbind(1)
        windows = F.pad(images, (self.pad,) * 4).unfold(2, height, 1).unfold(3, width, 1)
        picked = windows[torch.arange(count), :, rows, columns]
        return torch.where(mirrored.bool()[:, None, None, None], picked.flip(3), picked)


def first_images(loader: Iterable[Any], count: int) -> Tensor:
    """The first images that a loader gives, at most so many. Shapes: ``(N, C, H, W)``."""
    images: list[Tensor] = []
    for batch, _ in loader:
        images.append(batch)
        if sum(map(len, images)) >= count:
            break
    return torch.cat(images)[:count]


def standardised(images: Tensor, mean: tuple[float, ...], sd: tuple[float, ...]) -> Tensor:
    """8-bit images ``(N, C, H, W)`` to floats: divided by 255, less ``mean``, over ``sd``, channel by channel."""
    shift, scale = (torch.tensor(values).view(-1, 1, 1) for values in (mean, sd))
    return (images.float() / 255 - shift) / scale
