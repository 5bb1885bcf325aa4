"""How experiments run: with so many threads, and stopped by Ctrl-C like any program."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

__all__ = ["fit", "threads"]


def fit(trainer: Trainer, task: LightningModule, data: LightningDataModule) -> None:
    """``trainer.fit`` that passes Ctrl-C on, where Lightning would exit with code 1."""
    try:
        trainer.fit(task, datamodule=data)
    except SystemExit:
        if not trainer.interrupted:
            raise
        raise KeyboardInterrupt from None


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Compute with so many threads; ``None`` leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
