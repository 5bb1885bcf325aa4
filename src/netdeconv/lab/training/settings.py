"""What a training is made of, as the command line and recipes name it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import LightningDataModule
from torch import nn

from netdeconv import ConfigError
from netdeconv.lab.data import DATASETS
from netdeconv.lab.names import nearest
from netdeconv.lab.networks import network
from netdeconv.lab.norms import with_norm
from netdeconv.lab.schedules import Schedule
from netdeconv.lab.tasks import Classification, Segmentation, Task
from netdeconv.lab.training.options import Network, instantiated, refused

__all__ = ["Network", "build_data", "build_network", "build_task", "resolved_data"]


def resolved_data(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a data set, checked, with their defaults, as plain values.

    Args:
        options: ``name``, one of ``DATASETS``, and options of its class.

    Raises:
        ConfigError: unknown name or option, or a value of the wrong type.
    """
    name = options.get("name")
    if name is None:
        raise ConfigError(f"expected a data set, got none. Give --config RECIPE, or --data NAME: {', '.join(DATASETS)}")
    if name not in DATASETS:
        raise ConfigError(f"--data: there is no {name}. {nearest(str(name), DATASETS)}")
    given = {key: value for key, value in options.items() if key != "name"}
    parser = _data_parser(name)
    known = parser.get_defaults().data
    for key, value in given.items():
        if key not in known:
            raise ConfigError(f"--data.{key}: {name} has no such option. {nearest(key, known)}")
        try:
            parser.parse_object({"data": {key: value}})
        except ArgumentError:
            raise ConfigError(refused(f"data.{key}", value, {"data": DATASETS[name]})) from None
    found = parser.parse_object({"data": given}).data
    return {"name": name, **{key: _plain(value) for key, value in found.as_dict().items()}}


def build_data(options: dict[str, Any]) -> LightningDataModule:
    """The data module for checked options."""
    parser = _data_parser(options["name"])
    given = {key: value for key, value in options.items() if key != "name"}
    return cast("LightningDataModule", instantiated(parser, parser.parse_object({"data": given})).data)


def _plain(value: Any) -> Any:
    """As it is written in YAML."""
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


def _data_parser(name: str) -> ArgumentParser:
    """What checks the options of a data set."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DATASETS[name], "data")
    return parser


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
