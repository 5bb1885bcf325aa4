"""What is made of the settings of a training: data, task, and a Lightning trainer with its run folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import instantiate_class
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from netdeconv import ConfigError
from netdeconv.lab.training.callbacks import EndTogether, History, SeededSteps
from netdeconv.lab.training.options import Checkpoints, Network, instantiated, parsed, settings_parser
from netdeconv.lab.training.output import EpochLines, LossBar
from netdeconv.lab.training.saving import FolderCheckpoint, StepCheckpoint, WholeFiles
from netdeconv.lab.training.settings import build_data, build_task, resolved_data
from netdeconv.lab.training.signature import Signature

__all__ = ["Training"]

_OWN_FILES = ("fsdp", "deepspeed")  # strategies that write checkpoints in a way of their own


class Training:
    """Data, task and trainer as the settings have them; running them is left to the caller.

    Args:
        command: ``"fit"``, ``"validate"`` or ``"test"``.
        words: options with their values, see :func:`netdeconv.lab.training.arguments.full_arguments`.

    Attributes:
        out: run folder.
        about: what the network is, see :class:`Signature`.
        text: the resolved settings, as YAML.
        history: the numbers of every epoch.
        monitor: the logged number that decides which epoch is the best.

    Raises:
        ConfigError: settings that cannot be parsed or cannot be meant.
        SystemExit: after ``--print_config`` or ``--help``.
    """

    def __init__(self, command: str, words: Sequence[str]) -> None:
        self.command = command
        parser = settings_parser(command, Trainer)
        self.config = config = parsed(parser, words, Trainer)
        config.data = resolved_data(dict(config.data))
        if config.seed_everything is not False:
            drawn = None if config.seed_everything is True else config.seed_everything
            config.seed_everything = seed_everything(drawn, workers=True)
            if config.data.get("seed") == 0:
                config.data["seed"] = config.seed_everything
        name = "-".join([config.data["name"], config.network.replace(":", "-"), config.norm])
        self.out = Path(config.out or Path("runs", name))
        config.out = str(self.out)
        self.ckpt_path, config.ckpt_path = config.ckpt_path, None
        self.text = parser.dump(config)

        self.settings = settings = instantiated(parser, config)
        self.datamodule = data = cast("Any", build_data(config.data))
        network = Network(**{name: settings[name] for name in Network.__dataclass_fields__})
        optimizer = partial(instantiate_class, init=settings.optimizer.as_dict())
        self.model = build_task(network, data, optimizer, settings.schedule)
        self.about = {
            "network": network.network,
            "width": network.width,
            "norm": network.norm,
            "classes": data.num_classes,
        }
        self.history = History(self.out, title=", ".join(str(self.about[name]) for name in ("network", "norm")))
        part = self.model.parts[0]
        measures = cast("nn.ModuleDict", self.model.measures[part])
        self.monitor = settings.checkpoint.monitor or f"{part}/{next(iter(measures))}"
        self.trainer = self._trainer()

    def _trainer(self) -> Trainer:
        """The trainer, with what the run folder needs where its options do not say otherwise."""
        config = self.settings.trainer.as_dict()
        config["callbacks"] = _listed(config["callbacks"])
        if config["enable_progress_bar"] is None:
            config["enable_progress_bar"] = sys.stdout.isatty()
        if config["enable_progress_bar"] and not any(isinstance(one, ProgressBar) for one in config["callbacks"]):
            config["callbacks"].append(LossBar())
        if config["enable_model_summary"] is None:
            config["enable_model_summary"] = False
        if config["default_root_dir"] is None:
            config["default_root_dir"] = str(self.out)
        if self.command != "fit" and config["logger"] is None:
            config["logger"] = False  # an evaluation leaves the run folder as it is
        if config["logger"] in (None, True) and not config["fast_dev_run"]:
            config["logger"] = [
                TensorBoardLogger(self.out, name="logs", version="tensorboard", default_hp_metric=False),
                CSVLogger(self.out / "logs", name="csv"),
            ]
        if not any(name in str(config["strategy"]).lower() for name in _OWN_FILES):
            config["plugins"] = [*_listed(config["plugins"]), WholeFiles()]
        config["callbacks"] += self._callbacks(config)
        try:
            return Trainer(**config)
        except ValueError as error:  # e.g. names of accelerators and strategies that there are not
            raise ConfigError(f"--trainer: {error}") from error

    def _callbacks(self, config: dict[str, Any]) -> list[Callback]:
        checkpoint: Checkpoints = self.settings.checkpoint
        seed = self.config.seed_everything
        callbacks: list[Callback] = [Signature(self.about, self.text), EndTogether()]
        if seed is not False:
            callbacks.append(SeededSteps(int(seed)))
        if config["fast_dev_run"]:
            return callbacks
        callbacks += [self.history, EpochLines(self.history)]
        if config["enable_checkpointing"] is False:
            return callbacks
        place: dict[str, Any] = {"dirpath": self.out.absolute() / "checkpoints", "enable_version_counter": False}
        return [
            *callbacks,
            FolderCheckpoint(
                filename="best", monitor=self.monitor, mode=checkpoint.mode, save_on_train_epoch_end=True, **place
            ),
            FolderCheckpoint(filename="last", every_n_epochs=1, save_on_train_epoch_end=True, **place),
            StepCheckpoint(filename="last", every_n_train_steps=checkpoint.every_n_steps, **place),
        ]


def _listed(value: Any) -> list[Any]:
    """What Lightning takes as nothing, one, or several."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
