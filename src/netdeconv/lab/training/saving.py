"""Checkpoints that are either whole or the ones from before."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from netdeconv import ConfigError
from netdeconv.lab.store import write_whole

__all__ = ["FolderCheckpoint", "StepCheckpoint", "WholeFiles"]


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there when it is whole.

    Lightning's own way goes by a temporary file that may be on another disk, from where the last good checkpoint is
    overwritten byte by byte.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save.

        Raises:
            ConfigError: no room, or another reason of the disk's; what was there before is still there.
        """
        content = io.BytesIO()
        torch.save(checkpoint, content)
        try:
            write_whole(Path(path), content.getvalue())
        except OSError as error:
            kept = "The checkpoint from before is kept" if Path(path).exists() else "There is none yet"
            raise ConfigError(
                f"cannot save {path}: {error.strerror or error}. {kept}; make room, then run the same command again"
            ) from error


class FolderCheckpoint(ModelCheckpoint):
    """Lightning's, for a run folder that may be moved, and whose next start may save at other times.

    The best so far is known by its name in the folder.
    """

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}-{self.filename}"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def here(path: str) -> str:
            return os.path.join(str(self.dirpath), os.path.basename(path)) if path else path

        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        moved = {name: here(state_dict[name]) for name in paths}
        best = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **moved, "best_k_models": best, "dirpath": self.dirpath})


class StepCheckpoint(FolderCheckpoint):
    """The last checkpoint, every so many optimizer steps, and when the process is asked to end.

    Not after the last step of an epoch: a run that went on from there would leave out the evaluation that follows.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_last_batch:
            return
        if trainer.received_sigterm:  # in all processes, see EndTogether
            trainer.save_checkpoint(f"{self.dirpath}/{self.filename}{self.FILE_EXTENSION}")
        else:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
