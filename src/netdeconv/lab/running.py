"""How experiments run: with so many threads, and stopped by Ctrl-C like any program."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from netdeconv.lab.allocator import keep_freed_memory

__all__ = ["accelerator", "fit", "threads"]


def fit(
    task: LightningModule,
    data: LightningDataModule,
    *,
    epochs: int,
    callbacks: Sequence[Callback],
    steps: int | None = None,
    device: str = "cpu",
) -> None:
    """Train on one device, with nothing written and nothing printed but by the callbacks.

    Args:
        task: what to train.
        data: what on.
        epochs: how often.
        callbacks: who is told.
        steps: most training steps in an epoch; ``None`` for all there are.
        device: one of :data:`netdeconv.lab.devices.DEVICES`; the task is back on the CPU afterwards.

    Raises:
        KeyboardInterrupt: on Ctrl-C, where Lightning would exit with code 1.
    """
    keep_freed_memory()
    trainer = Trainer(
        accelerator=accelerator(device),
        devices=1,
        max_epochs=epochs,
        limit_train_batches=steps,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    try:
        trainer.fit(task, datamodule=data)
    except SystemExit:
        if not trainer.interrupted:
            raise
        raise KeyboardInterrupt from None


def accelerator(device: str) -> str:
    """What Lightning calls the device."""
    return {"cpu": "cpu", "cuda": "gpu"}[device]


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Compute with so many threads; ``None`` leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
