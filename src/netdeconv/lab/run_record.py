"""What experiments keep of a run: curves, step times, and the accuracy with recomputed statistics."""

from __future__ import annotations

import copy
import time
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from netdeconv.lab.tasks import Classification

__all__ = ["RunRecord", "with_fresh_statistics"]


class RunRecord(Callback):
    """Keeps the curves of one run and the time of every training step.

    A step's time runs from the batch being ready to the parameters being updated: forward, backward,
    optimiser and Lightning's own work around them; evaluation is not in it. A GPU is waited for.

    Args:
        images: what :func:`with_fresh_statistics` recomputes the statistics from after the first epoch; ``None`` to
            leave that out.
        test: images and labels to measure that network's accuracy on.

    Attributes:
        curves: one list per logged number, one value per finished epoch.
        step_seconds: one value per training step.
        fresh_accuracy: accuracy after the first epoch with recomputed statistics.
    """

    def __init__(self, images: Tensor | None = None, test: tuple[Tensor, Tensor] | None = None) -> None:
        self.images = images
        self.test = test
        self.fresh_accuracy = 0.0
        self.curves: dict[str, list[float]] = {}
        self.step_seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.step_seconds.append(time.perf_counter() - self._start)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, value in trainer.callback_metrics.items():
            self.curves.setdefault(name, []).append(float(value))
        if trainer.current_epoch == 0 and self.images is not None and self.test is not None:
            net = with_fresh_statistics(cast("Classification", pl_module).net, self.images)
            images, labels = self.test
            with torch.no_grad():
                self.fresh_accuracy = float((net(images).argmax(1) == labels).double().mean())


def with_fresh_statistics(net: nn.Module, images: Tensor) -> nn.Module:
    """A copy for evaluation whose normalisation statistics are those of the images, taken in one batch.

    The averages that a network remembers while it trains lag behind its weights, most so in the first epoch.
    This takes the lag away, for batch normalisation and for whitening alike; the weights stay as they are.
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
