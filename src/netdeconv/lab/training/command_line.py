"""LightningCLI for this package's networks: settings from recipes and options, and what is made of them."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, instantiate_class
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.optim import Optimizer

from netdeconv import ConfigError
from netdeconv.lab.schedules import Schedule
from netdeconv.lab.training.callbacks import EndTogether, History, SeededSteps
from netdeconv.lab.training.options import Checkpoints, Network
from netdeconv.lab.training.output import EpochLines, LossBar
from netdeconv.lab.training.saving import FolderCheckpoint, StepCheckpoint, WholeFiles
from netdeconv.lab.training.settings import build_data, build_task, resolved_data
from netdeconv.lab.training.signature import Signature

__all__ = ["TrainingCLI"]

_SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}
_OWN_FILES = ("fsdp", "deepspeed")  # strategies that write checkpoints in a way of their own


class TrainingCLI(LightningCLI):
    """Parses, and builds data, task and trainer; running them is left to the caller.

    Args:
        args: the command line after the command.
        command: ``"fit"``, ``"validate"`` or ``"test"``.

    Attributes:
        out: run folder.
        about: what the network is, see :class:`Signature`.
        text: the resolved settings, as YAML.
        history: the numbers of every epoch.
        monitor: the logged number that decides which epoch is the best.

    Raises:
        ConfigError: settings that cannot be meant.
        jsonargparse.ArgumentError: options that cannot be parsed.
    """

    def __init__(self, args: list[str], command: str) -> None:
        self.command = command
        prog = f"netdeconv {command}"
        super().__init__(
            save_config_callback=None,
            seed_everything_default=0,
            parser_kwargs={"prog": prog, "exit_on_error": False, "allow_abbrev": False, "description": _DESCRIPTION},
            args=args,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--data", type=dict[str, Any], default={}, help="data set, and --data.OPTION of it")
        parser.add_class_arguments(Network, None)
        parser.add_class_arguments(Schedule, "schedule")
        parser.add_optimizer_args((Optimizer,))
        parser.set_defaults({"optimizer": _SGD})
        parser.add_class_arguments(Checkpoints, "checkpoint")
        parser.add_argument("--out", type=str | None, default=None, help="run folder (default: runs/DATA-NETWORK-NORM)")
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="checkpoint to begin with: last or best of the run folder, a path, or none",
        )
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.set_defaults({"trainer.log_every_n_steps": 10, "trainer.num_sanity_val_steps": 0})  # no statistics yet

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Lightning's own warns of arguments that do not come from ``sys.argv``."""
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        self.config.data = resolved_data(dict(self.config.data))
        seed = self.config.seed_everything
        if self.config.data.get("seed") == 0 and isinstance(seed, int) and not isinstance(seed, bool):
            self.config.data["seed"] = seed
        name = "-".join([self.config.data["name"], self.config.network.replace(":", "-"), self.config.norm])
        self.out = Path(self.config.out or Path("runs", name))
        self.config.out = str(self.out)
        self.ckpt_path, self.config.ckpt_path = self.config.ckpt_path, None
        self.text = self.parser.dump(self.config)

    def instantiate_classes(self) -> None:
        config = self.config_init = self.parser.instantiate_classes(self.config)
        self.datamodule = data = cast("Any", build_data(config.data))
        network = Network(**{name: config[name] for name in Network.__dataclass_fields__})
        optimizer = partial(instantiate_class, init=config.optimizer.as_dict())
        self.model = build_task(network, data, optimizer, config.schedule)
        self.about = {
            "network": network.network,
            "width": network.width,
            "norm": network.norm,
            "classes": data.num_classes,
        }
        self.history = History(self.out, title=", ".join(str(self.about[name]) for name in ("network", "norm")))
        part = self.model.parts[0]
        self.monitor = config.checkpoint.monitor or f"{part}/{next(iter(self.model.measures[part]))}"
        self.trainer = self.instantiate_trainer()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with what the run folder needs where its options do not say otherwise."""
        config = {**self.config_init.trainer.as_dict(), **kwargs}
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
            return self.trainer_class(**config)
        except ValueError as error:  # e.g. names of accelerators and strategies that there are not
            raise ConfigError(f"--trainer: {error}") from error

    def _callbacks(self, config: dict[str, Any]) -> list[Callback]:
        checkpoint: Checkpoints = self.config_init.checkpoint
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


_DESCRIPTION = "Options may also come from YAML files, given by --config; the recipes are such files."


def _listed(value: Any) -> list[Any]:
    """What Lightning takes as nothing, one, or several."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
