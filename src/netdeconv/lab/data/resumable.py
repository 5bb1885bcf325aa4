"""Loaders whose batches depend on seed and epoch alone: divided over processes, resumed at any batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from netdeconv import ConfigError

__all__ = ["ResumableBatches", "mixed", "seeded"]


class ResumableBatches(ABC):
    """Batches of a data set of known length, without torch's ``DataLoader`` and its state.

    The order in epoch ``e`` depends on ``seed`` and ``e`` alone, so that a resumed training meets what the
    uninterrupted one would have met. Lightning calls ``sampler.set_epoch`` before every epoch, and
    :meth:`state_dict` and :meth:`load_state_dict` around a checkpoint; a plain loop calls nothing, and every
    complete pass ends by going to the next epoch.

    With ``torch.distributed`` initialised, every process gets its share, and the processes' k-th batches together
    are the k-th batch of one process with ``batch_size`` times their number. Training shares are equally long, some
    images serving twice where they must, as in ``DistributedSampler``; evaluation shares are exact.

    Args:
        count: number of images.
        batch_size: of a batch in one process; the last batch may be smaller.
        seed: of the order; ``None`` keeps the images as they are, for evaluation.
    """

    def __init__(self, count: int, *, batch_size: int, seed: int | None) -> None:
        if batch_size < 1:
            raise ConfigError(f"expected a batch_size of at least 1, got {batch_size}")
        if seed is not None and seed < 0:
            raise ConfigError(f"expected a seed of at least 0, got {seed}")
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self._handed_out = (0, 0)  # the epoch that runs, and how many of its batches were asked for
        self._resume_at: tuple[int, int] | None = None

    @property
    def sampler(self) -> ResumableBatches:
        """Itself: Lightning calls ``set_epoch`` of what it finds under this name, as on torch's ``DataLoader``."""
        return self

    @property
    def batch_sampler(self) -> ResumableBatches:
        """Itself; Lightning asks for it wherever there is a ``sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next pass is."""
        self.epoch = epoch

    def __len__(self) -> int:
        rank, processes = _place()
        share = len(range(rank, self.count, processes)) if self.seed is None else -(-self.count // processes)
        return -(-share // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        # Nothing happens before the first batch is asked for: Lightning makes the iterator first, then sets the epoch.
        epoch, first = self.epoch, 0
        if self._resume_at is not None and self._resume_at[0] == epoch:
            first = self._resume_at[1]
        self._resume_at = None
        for number, batch in enumerate(self.batches(epoch, first), first + 1):
            self._handed_out = (epoch, number)
            yield batch
        if self.epoch == epoch:
            self.epoch += 1

    @abstractmethod
    def batches(self, epoch: int, first: int) -> Iterator[Any]:
        """This process' batches of an epoch, from number ``first`` on."""

    def chunks(self, epoch: int, first: int) -> Iterator[tuple[int, Tensor, slice]]:
        """What all processes take together at each step.

        Yields:
            The batch's number, the indices of all processes' images, and which of them are this process'.
        """
        rank, processes = _place()
        if self.seed is None:
            order = torch.arange(self.count)
        else:
            order = torch.randperm(self.count, generator=seeded(self.seed, epoch))
            order = order[torch.arange(-(-self.count // processes) * processes) % max(self.count, 1)]
        together = order.split(self.batch_size * processes) if len(order) else ()
        for number in range(first, min(len(together), len(self))):
            yield number, together[number], slice(rank, None, processes)

    def state_dict(self) -> dict[str, Any]:
        """How far this loader is: the batches that were asked for count as done."""
        return {"epoch": self._handed_out[0], "batch": self._handed_out[1], "setting": self._setting()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was called.

        Raises:
            ConfigError: in the middle of an epoch, and the batches are not those of the state.
        """
        epoch, batch = state["epoch"], state["batch"]
        saved, present = state["setting"], self._setting()
        if batch >= -(-saved["images"] // (saved["batch_size"] * saved["processes"])):
            epoch, batch = epoch + 1, 0
        if batch and saved != present:
            differ = [name for name in present if saved.get(name) != present[name]]
            raise ConfigError(
                "the checkpoint is from the middle of an epoch, which can go on only with "
                + ", ".join(f"{name} {saved.get(name)} (got {present[name]})" for name in differ)
                + "; use the same, or a checkpoint from the end of an epoch"
            )
        self.epoch = epoch
        self._handed_out = self._resume_at = (epoch, batch)

    def _setting(self) -> dict[str, int | None]:
        return {"images": self.count, "batch_size": self.batch_size, "seed": self.seed, "processes": _place()[1]}


def mixed(*numbers: int) -> int:
    """One seed, of 32 bits, from several numbers of 0 or more, e.g. seed and epoch.

    Zeros at the end do not count: where tuples of several lengths are in use, the last number must be above 0.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seeded(*numbers: int) -> torch.Generator:
    """A generator that starts from :func:`mixed` of these numbers."""
    return torch.Generator().manual_seed(mixed(*numbers))


def _place() -> tuple[int, int]:
    """Rank of this process, and number of processes."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
