"""Batches of images that worker processes read from files, each image's augmentation by a seed of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from netdeconv import ConfigError
from netdeconv.lab.data.files import UNREADABLE, name_broken
from netdeconv.lab.data.resumable import ResumableBatches, mixed

__all__ = ["FileBatches", "Samples"]

_PATIENCE = 100


class Samples(Protocol):
    """Images and labels in files."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        """Read, decode and transform one; raises one of ``UNREADABLE`` for a broken file."""
        ...

    def path(self, index: int) -> str:
        """The image's file."""
        ...


class FileBatches(ResumableBatches):
    """Batches of images in files.

    What an image becomes in an epoch depends on seed, epoch and image alone: not on the number of workers, nor on the
    global random state, which is left as it is. In place of a file that cannot be read, training takes the next one;
    evaluation goes without. Each is named once, in a warning.

    Args:
        samples: where images and labels come from.
        batch_size: of a batch in one process; the last batch may be smaller.
        seed: order and augmentation of the images; ``None`` keeps the order, for evaluation.
        num_workers: processes that read; 0 reads in this one.
        strict: stop at a file that cannot be read.
    """

    def __init__(
        self, samples: Samples, *, batch_size: int, seed: int | None, num_workers: int, strict: bool = False
    ) -> None:
        if num_workers < 0:
            raise ConfigError(f"expected a num_workers of at least 0, got {num_workers}")
        super().__init__(len(samples), batch_size=batch_size, seed=seed)
        self.samples = samples
        self.num_workers = num_workers
        self.strict = strict
        self._named: set[str] = set()

    def batches(self, epoch: int, first: int) -> Iterator[Any]:
        """Batches from workers that start here and stop with the last batch.

        Raises:
            ConfigError: a broken file, with ``strict``, or nothing but broken files.
        """
        keys = (
            [(epoch, index) for index in together[mine].tolist()] for _, together, mine in self.chunks(epoch, first)
        )
        loader: DataLoader[Any] = DataLoader(
            _Reader(self.samples, self.seed),
            batch_sampler=keys,
            num_workers=self.num_workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else torch would draw from the global one
        )
        for batch, broken in loader:
            new = [line for line in broken if line not in self._named]
            self._named.update(new)
            name_broken(new, strict=self.strict)
            if batch is not None:
                yield batch
            elif self.seed is not None:
                raise ConfigError(f"expected images, got {_PATIENCE} files in a row that cannot be read: {broken[0]}")


class _Reader(Dataset[Any]):
    """Runs in the workers: reads what the key says, and reports broken files instead of raising."""

    def __init__(self, samples: Samples, seed: int | None) -> None:
        self.samples = samples
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, list[str]]:
        epoch, index = key
        broken: list[str] = []
        with torch.random.fork_rng(devices=[]):
            for other in range(_PATIENCE if self.seed is not None else 1):
                candidate = (index + other) % len(self.samples)
                if self.seed is not None:
                    torch.default_generator.manual_seed(mixed(self.seed, epoch, candidate + 1))
                try:
                    return self.samples[candidate], broken
                except UNREADABLE as error:
                    broken.append(f"{self.samples.path(candidate)} ({error})")
        return None, broken


def _collate(read: Sequence[tuple[Any, list[str]]]) -> tuple[Any, list[str]]:
    found = [sample for sample, _ in read if sample is not None]
    return default_collate(found) if found else None, [line for _, broken in read for line in broken]
