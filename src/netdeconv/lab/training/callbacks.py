"""What a training does beside the steps: seeds, and the curves on disk."""

from __future__ import annotations

import csv
import io
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from netdeconv.lab.data.resumable import mixed
from netdeconv.lab.store import write_whole
from netdeconv.lab.tasks import PARTS

__all__ = ["EndTogether", "History", "SeededSteps"]


class SeededSteps(Callback):
    """Seeds torch before every step from the run's seed, the process, the epoch and the step.

    So dropout draws the same in a run that was stopped and goes on as in one that was not.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        place = (self.seed, trainer.global_rank, trainer.current_epoch, batch_idx + 1)
        torch.manual_seed(mixed(*place))


class EndTogether(Callback):
    """Lets all processes of a training end after the same step, once one of them has received SIGTERM.

    Lightning's own way, a broadcast inside the signal handler, meets whatever the processes are exchanging at that
    moment, and they wait for each other for ever.
    """

    def __init__(self) -> None:
        self.asked = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)  # Lightning restores what was there before its own

    def _note(self, number: int, frame: Any) -> None:
        self.asked = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(self.asked, all=False):
            trainer._signal_connector.received_sigterm = True


class History(Callback):
    """One row of numbers for every epoch, in ``metrics.csv`` and as curves in ``curves.png``.

    The rows are part of the checkpoint: a run that goes on from it goes on with them.

    Args:
        folder: of the run.
        title: of the picture.
    """

    def __init__(self, folder: Path, *, title: str) -> None:
        self.folder = folder
        self.title = title
        self.rows: list[dict[str, float]] = []
        self.evaluated = False  # in this epoch; Lightning keeps the numbers of earlier ones

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = [dict(row) for row in state_dict["rows"]]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.evaluated = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.evaluated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        row = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step, "rate": float(rate)}
        row |= {
            name: float(value)
            for name, value in sorted(trainer.callback_metrics.items())
            if self.evaluated or name.partition("/")[0] not in PARTS
        }
        self.rows = [*(old for old in self.rows if old["epoch"] < row["epoch"]), row]
        if trainer.is_global_zero:
            self.write()

    def write(self) -> None:
        """Write the rows and the picture."""
        from netdeconv.lab.plots import history_figure, png

        names = dict.fromkeys(name for row in self.rows for name in row)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _plain(value) for name, value in row.items()} for row in self.rows)
        write_whole(self.folder / "metrics.csv", text.getvalue().encode())
        write_whole(self.folder / "curves.png", png(history_figure(self.rows, self.title)))


def _plain(value: float) -> str:
    """The shortest decimal that reads back as the same float32: 0.79, not 0.7900000214576721."""
    return str(value) if isinstance(value, int) else str(np.float32(value))
