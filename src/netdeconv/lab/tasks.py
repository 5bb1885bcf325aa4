"""Lightning modules: what is trained, how, and how it is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from netdeconv import ConfigError
from netdeconv.lab.schedules import Schedule

__all__ = ["PARTS", "VOID", "Classification", "Segmentation", "Task"]

PARTS = ("validation", "test")
VOID = 255  # label of pixels that count nowhere, as in Cityscapes

_MANY_CLASSES = 100  # from here on the top-5 accuracy says something


class Task(LightningModule):
    """What classification and segmentation share: loss, optimizer, and a learning rate that falls step by step.

    Logs ``train/loss``, and for each evaluation loader ``validation/...`` or ``test/...``: loss and measures.

    Args:
        net: the network.
        optimizer: makes the optimizer from groups of parameters, ``[{"params": ...}, ...]``.
        schedule: of the learning rate.
        parts: what the validation loaders hold, in their order.
        channels_last: store images and weights with the channels last.
    """

    rate_factors: Mapping[str, float] = {}  # prefix of parameter names -> factor on the learning rate

    def __init__(
        self,
        net: nn.Module,
        *,
        optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        schedule: Schedule | None = None,
        parts: tuple[str, ...] = PARTS,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.layout = torch.channels_last if channels_last else torch.preserve_format
        self.net = net.to(memory_format=self.layout)
        self.optimizer = optimizer
        self.schedule = Schedule() if schedule is None else schedule
        self.parts = parts
        self.train_loss = MeanLoss()
        self.train_loss.persistent(True)  # a run that goes on in mid-epoch has the mean of the whole epoch
        measured = dict.fromkeys((*parts, "test"))
        self.measures = nn.ModuleDict({part: nn.ModuleDict(self.make_measures()) for part in measured})
        self.losses = nn.ModuleDict({part: MeanLoss() for part in measured})

    def make_measures(self) -> dict[str, Metric]:
        """What to log of the evaluation outputs, by name."""
        raise NotImplementedError

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """What is minimised."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Any:
        return self.net(x.contiguous(memory_format=self.layout) if self.layout != torch.preserve_format else x)

    def scores(self, outputs: Any) -> Tensor:
        """The part of the network's outputs that is evaluated."""
        return cast("Tensor", outputs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The mean loss so far is saved over all processes; when a run goes on, the first one has it."""
        with self.train_loss.sync_context():
            sums = {f"train_loss.{name}": value.clone() for name, value in self.train_loss.state_dict().items()}
        checkpoint["state_dict"].update(sums)

    def on_train_start(self) -> None:
        if self.global_rank > 0:
            self.train_loss.reset()

    def on_train_epoch_start(self) -> None:
        self.train_loss.reset()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        loss = self.loss(self(images), targets)
        self.train_loss.update(loss.detach(), len(targets))
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx >= len(self.parts):
            raise ConfigError(f"expected {len(self.parts)} validation loaders, for {self.parts}, got more")
        self._evaluate(batch, self.parts[dataloader_idx])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], part: str) -> None:
        images, targets = batch
        outputs = self(images)
        options: dict[str, Any] = {"on_epoch": True, "add_dataloader_idx": False}
        loss = cast("MeanLoss", self.losses[part])
        loss.update(self.loss(outputs, targets), len(targets))
        self.log(f"{part}/loss", loss, **options)
        for name, measure in cast("nn.ModuleDict", self.measures[part]).items():
            cast("Metric", measure).update(self.scores(outputs), targets)
            self.log(f"{part}/{name}", cast("Metric", measure), **options)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self._groups())
        for group in optimizer.param_groups:
            group["lr"] *= group.pop("rate_factor", 1.0)
        scheduler = self.schedule.scheduler(optimizer, lambda: self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters by the factor on their learning rate."""
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            factors = [factor for prefix, factor in self.rate_factors.items() if name.startswith(prefix)]
            groups.setdefault(factors[0] if factors else 1.0, []).append(parameter)
        return [{"params": parameters, "rate_factor": factor} for factor, parameters in sorted(groups.items())]


class Classification(Task):
    """Image classification by cross entropy.

    Measures accuracy, the share of images whose largest output is the right class, and from 100 classes on
    ``accuracy5``, whose five largest have it.

    Args:
        net: images to one output per class; of several heads the first one, or ``logits``, is the network's answer.
        classes: number of classes.
        smoothing: label smoothing.
        options: of :class:`Task`.
    """

    def __init__(self, net: nn.Module, *, classes: int, smoothing: float = 0.0, **options: Any) -> None:
        self.classes = classes
        self.smoothing = smoothing
        super().__init__(net, **options)

    def make_measures(self) -> dict[str, Metric]:
        tops = {"accuracy": 1} | ({"accuracy5": 5} if self.classes >= _MANY_CLASSES else {})
        return {
            name: MulticlassAccuracy(num_classes=self.classes, average="micro", top_k=k) for name, k in tops.items()
        }

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.scores(outputs), targets, label_smoothing=self.smoothing)

    def scores(self, outputs: Any) -> Tensor:
        return outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", outputs[0])


class Segmentation(Task):
    """A class for every pixel, by cross entropy; pixels of class 255 (void) count nowhere.

    Measures ``miou``, the mean over the classes of intersection over union of all pixels, classes that neither occur
    nor are predicted left out; and ``pixel_accuracy``.

    Args:
        net: images to ``{"out": (N, classes, H, W)}``, and in training also ``"aux"`` from an auxiliary head.
        classes: number of classes.
        aux_weight: of the auxiliary head's loss.
        aux_rate_factor: on the learning rate of the auxiliary head.
        options: of :class:`Task`.
    """

    def __init__(
        self, net: nn.Module, *, classes: int, aux_weight: float = 0.5, aux_rate_factor: float = 10.0, **options: Any
    ) -> None:
        self.classes = classes
        self.aux_weight = aux_weight
        self.rate_factors = {"net.aux_classifier.": aux_rate_factor}
        super().__init__(net, **options)

    def make_measures(self) -> dict[str, Metric]:
        return {
            "miou": MulticlassJaccardIndex(num_classes=self.classes, ignore_index=VOID),
            "pixel_accuracy": MulticlassAccuracy(num_classes=self.classes, average="micro", ignore_index=VOID),
        }

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        loss = _pixel_loss(outputs["out"], targets)
        if self.training and "aux" in outputs:
            loss = loss + self.aux_weight * _pixel_loss(outputs["aux"], targets)
        return loss

    def scores(self, outputs: Any) -> Tensor:
        return cast("Tensor", outputs["out"])


class MeanLoss(Metric):
    """Mean of the batches' losses, weighted by their sizes; NaN stays NaN.

    torchmetrics' ``MeanMetric`` either leaves NaN out, waiting for the device at every step, or forgets the weights.
    """

    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "count"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")

    def update(self, loss: Tensor, count: int) -> None:
        self.total += loss * count
        self.count += count

    def compute(self) -> Tensor:
        return self.total / self.count


def _pixel_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over the pixels that count; 0 where there are none."""
    total = F.cross_entropy(outputs, targets, ignore_index=VOID, reduction="sum")
    return total / (targets != VOID).sum().clamp(min=1)
