"""What a training is made of, as the command line and recipes name it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningDataModule
from torch import nn

from netdeconv import ConfigError
from netdeconv.lab.data import DATASETS
from netdeconv.lab.names import nearest
from netdeconv.lab.networks import network
from netdeconv.lab.norms import with_norm
from netdeconv.lab.schedules import Schedule
from netdeconv.lab.tasks import Classification, Segmentation, Task
from netdeconv.lab.training.messages import in_one_line

__all__ = ["Checkpoints", "Network", "build_data", "build_network", "build_task", "resolved_data"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """The network and how it is run.

    Args:
        network: small, a network of the zoo, or torchvision:NAME.
        width: factor on the channels.
        norm: normalisation: bn, nd, nd-paper, nd-authors, gn, ln, in, none.
        whitening: settings of WhiteningConfig that differ from the norm's own, e.g. --whitening.update_every 4.
        smoothing: label smoothing, for classification.
        aux_weight: of the auxiliary head's loss, for segmentation.
        aux_rate_factor: on the auxiliary head's learning rate, for segmentation.
        compile: compile the network with torch.compile.
        channels_last: store images and weights with the channels last.
    """

    network: str = "small"
    width: float = 1.0
    norm: str = "nd"
    whitening: dict[str, Any] = dataclasses.field(default_factory=dict)
    smoothing: float = 0.0
    aux_weight: float = 0.5
    aux_rate_factor: float = 10.0
    compile: bool = False
    channels_last: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When to save, and what the best checkpoint is.

    Args:
        every_n_steps: optimizer steps between two saves of the last checkpoint, which is saved after every epoch too.
        monitor: logged number that decides which checkpoint is the best; of the evaluation's measures the first one
            if not given.
        mode: max or min, what is better.
    """

    every_n_steps: int = 500
    monitor: str | None = None
    mode: str = "max"

    def __post_init__(self) -> None:
        if self.every_n_steps < 1:
            raise ConfigError(f"expected checkpoint.every_n_steps of at least 1, got {self.every_n_steps}")
        if self.mode not in ("max", "min"):
            raise ConfigError(f"expected checkpoint.mode max or min, got {self.mode!r}")


def resolved_data(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a data set, checked, with their defaults, as plain values.

    Args:
        options: ``name``, one of ``DATASETS``, and options of its class.

    Raises:
        ConfigError: unknown name or option, or a value of the wrong type.
    """
    from jsonargparse import ArgumentError

    name = options.get("name")
    if name is None:
        raise ConfigError(f"expected a data set, got none. Give --config RECIPE, or --data NAME: {', '.join(DATASETS)}")
    if name not in DATASETS:
        raise ConfigError(f"--data: there is no {name}. {nearest(str(name), DATASETS)}")
    parser, known = _data_parser(name)
    given = {key: value for key, value in options.items() if key != "name"}
    for key in given:
        if key not in known:
            raise ConfigError(f"--data.{key}: {name} has no such option. {nearest(key, known)}")
    try:
        found = parser.parse_object({"data": given})
    except ArgumentError as error:
        raise ConfigError(in_one_line(str(error))) from None
    return {"name": name, **{key: _plain(value) for key, value in found.data.as_dict().items()}}


def build_data(options: dict[str, Any]) -> LightningDataModule:
    """The data module for checked options."""
    parser, _ = _data_parser(options["name"])
    given = {key: value for key, value in options.items() if key != "name"}
    return cast("LightningDataModule", parser.instantiate_classes(parser.parse_object({"data": given})).data)


def _plain(value: Any) -> Any:
    """As it is written in YAML."""
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


def _data_parser(name: str) -> tuple[Any, list[str]]:
    """What checks the options of a data set, and their names."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    added = parser.add_class_arguments(DATASETS[name], "data")
    return parser, [key.removeprefix("data.") for key in added]


def build_network(settings: Network, data: LightningDataModule) -> nn.Module:
    """The network for a data set.

    Raises:
        ConfigError: unknown names, or settings that cannot apply.
    """
    described: Any = data
    net = network(
        settings.network,
        settings.width,
        described.num_classes,
        task=described.task,
        in_channels=described.in_channels,
        image_size=described.image_size if isinstance(described.image_size, int) else None,
    )
    return with_norm(net, settings.norm, settings.whitening, name=settings.network)


def build_task(settings: Network, data: LightningDataModule, optimizer: Any, schedule: Schedule) -> Task:
    """Network, loss, measures and optimizer for a data set."""
    described: Any = data
    net = build_network(settings, data)
    if settings.compile:
        net.compile()
    options: dict[str, Any] = {
        "classes": described.num_classes,
        "optimizer": optimizer,
        "schedule": schedule,
        "parts": _parts(data),
        "channels_last": settings.channels_last,
    }
    if described.task == "segmentation":
        return Segmentation(
            net, aux_weight=settings.aux_weight, aux_rate_factor=settings.aux_rate_factor, **options
        )
    return Classification(net, smoothing=settings.smoothing, **options)


def _parts(data: LightningDataModule) -> tuple[str, ...]:
    """What the validation loaders hold: with no validation part set aside, the test images."""
    return ("test",) if getattr(data, "validation", None) == 0 else ("validation", "test")
