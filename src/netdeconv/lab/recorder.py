"""What is kept of a training while it runs: curves, step times, and the accuracy with recomputed statistics."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from netdeconv.lab.progress import Progress

__all__ = ["Recorder", "with_fresh_statistics"]


class Recorder(Callback):
    """Keeps the curves of one training and the time of every step, and moves the bar.

    A step's time runs from the batch being ready to the parameters being updated; evaluation is not in it. A GPU is
    waited for.

    Args:
        progress: has the bar.
        parts: images and labels of the parts ``"train"`` and ``"test"``, to measure ``fresh_accuracy``; ``None`` to
            leave that out.

    Attributes:
        curves: one list per logged number, one value per finished epoch.
        step_seconds: one value per training step.
        fresh_accuracy: see :class:`netdeconv.lab.train.Record`.
    """

    def __init__(self, progress: Progress, parts: Mapping[str, tuple[Tensor, Tensor]] | None) -> None:
        self.progress = progress
        self.parts = parts
        self.curves: dict[str, list[float]] = {}
        self.step_seconds: list[float] = []
        self.fresh_accuracy: float | None = None
        self._start = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.step_seconds.append(time.perf_counter() - self._start)
        self.progress.step()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, value in trainer.callback_metrics.items():
            self.curves.setdefault(name, []).append(float(value))
        if self.parts is not None and trainer.current_epoch == 0:
            (seen, _), (images, labels) = (
                [tensor.to(pl_module.device) for tensor in self.parts[part]] for part in ("train", "test")
            )
            net: Any = pl_module.net
            with torch.no_grad():
                answers = with_fresh_statistics(net, seen)(images).argmax(1)
            self.fresh_accuracy = float((answers == labels).double().mean())


def with_fresh_statistics(net: nn.Module, images: Tensor) -> nn.Module:
    """A copy for evaluation whose normalisation statistics are those of the images, taken in one batch.

    Running statistics lag behind the weights, most so in the first epoch. This takes the lag away, for batch
    normalisation and for whitening alike; the weights stay as they are.
    """
    net = copy.deepcopy(net).train()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
        elif callable(reset := getattr(module, "reset_statistics", None)):
            reset()
    with torch.no_grad():
        net(images)
    return net.eval()
