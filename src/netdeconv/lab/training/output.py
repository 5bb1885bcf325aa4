"""What a training says while it runs and when it is over; the same lines in a terminal and in a log."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, TQDMProgressBar
from tqdm import tqdm

__all__ = ["EpochLines", "LossBar", "diverged", "ending"]

_SECONDS = 0.5  # between two looks at the loss, for which a GPU has to be waited for


class LossBar(TQDMProgressBar):
    """Lightning's bar with the loss of the epoch so far, epochs counted from 1, and nothing left behind it."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, Any] = {}
        self._looked = -math.inf

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        now = time.monotonic()
        if now - self._looked >= _SECONDS:
            self._looked = now
            items = super().get_metrics(trainer, pl_module)
            items.pop("v_num", None)  # a part of the log folder's name
            loss: Any = pl_module.train_loss
            self._shown = {"loss": f"{float(loss.total / loss.count):.4g}"} if float(loss.count) else {}
            self._shown |= items
        return self._shown

    def init_train_tqdm(self) -> Any:
        return _not_left(super().init_train_tqdm())

    def init_validation_tqdm(self) -> Any:
        return _not_left(super().init_validation_tqdm())

    def init_test_tqdm(self) -> Any:
        return _not_left(super().init_test_tqdm())

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self._looked = -math.inf
        self.train_progress_bar.set_description(_epoch(trainer.current_epoch + 1, trainer.max_epochs))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        parts: Any = pl_module.parts
        if dataloader_idx < len(parts):
            self.val_progress_bar.set_description(parts[dataloader_idx], refresh=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        for bar in (self._val_progress_bar, self._test_progress_bar, self._train_progress_bar):
            if bar is not None:
                bar.close()


class EpochLines(Callback):
    """Prints a line for every epoch, above the bar where one is drawn, once the epoch is saved.

    Lightning saves after all callbacks have seen the end of the epoch; a line that cannot be printed then, as into a
    pipe that nobody reads any more, would lose the epoch.

    Args:
        rows: of the epochs so far, see :class:`History`.
    """

    def __init__(self, history: Any) -> None:
        self.history = history
        self._pending: str | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _stopped_early(trainer) is not None:
            trainer.should_stop = True  # the same command again leaves it as it is, like any training that is finished

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        row = self.history.rows[-1]
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if "/" in name)
        self._pending = f"{_epoch(row['epoch'], trainer.max_epochs)}: {numbers}"

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, OSError):
            self._print(trainer)

    def _print(self, trainer: Trainer) -> None:
        line, self._pending = self._pending, None
        if line is None or not trainer.is_global_zero:
            return
        tqdm.write(line, file=sys.stdout)  # above the bars, if there are any
        sys.stdout.flush()


def ending(trainer: Trainer, rows: Sequence[Mapping[str, float]], *, monitor: str, mode: str, folder: Path) -> str:
    """The last words on a training: how it ended, its best epoch, and where everything is.

    Args:
        trainer: after the training.
        rows: one for each epoch, see :class:`History`.
        monitor, mode: the number that decides which epoch is the best, and whether ``"max"`` or ``"min"`` is.
        folder: of the run.
    """
    epochs = f"{len(rows)} epoch" + "s" * (len(rows) != 1)
    reason = _stopped_early(trainer)
    stopped = "" if reason is None else f", stopped early ({reason})"
    measured = [row for row in rows if math.isfinite(row.get(monitor, math.nan))]
    if not measured:
        return f"{folder}: {epochs}{stopped}"
    best = (max if mode == "max" else min)(measured, key=lambda row: row[monitor])
    return f"{folder}: {epochs}{stopped}; best {monitor} {best[monitor]:.4g} in epoch {best['epoch']}"


def diverged(rows: Sequence[Mapping[str, float]]) -> int | None:
    """The first of the last epochs that have a loss of NaN; ``None`` where the last epoch has none."""
    first = None
    for row in reversed(rows):
        if not any(math.isnan(value) for name, value in row.items() if name.endswith("/loss")):
            break
        first = int(row["epoch"])
    return first


def _stopped_early(trainer: Trainer) -> str | None:
    """Why training was stopped before its last epoch, now or before the checkpoint that it went on from."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping) and callback.stopping_reason.value:
            reason = callback.stopping_reason_message or f"{callback.monitor} is no better"
            return reason.removesuffix(" Signaling Trainer to stop.").rstrip(".")
    return None


def _epoch(number: int, epochs: int | None) -> str:
    return f"epoch {number}" + (f"/{epochs}" if epochs is not None and epochs > 0 else "")


def _not_left(bar: Any) -> Any:
    bar.leave = False
    return bar
