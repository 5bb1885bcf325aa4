"""The options of fit, validate and test; without Lightning, so that help and mistakes answer at once."""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace
from torch import optim

from netdeconv import ConfigError, zoo
from netdeconv.lab.norms import NORMS
from netdeconv.lab.schedules import Schedule
from netdeconv.lab.training.recipes import recipes

__all__ = [
    "DATA_OPTIONS",
    "Checkpoints",
    "Network",
    "help_text",
    "instantiated",
    "parsed",
    "refused",
    "settings_parser",
]

_ALL, _FILES = ("root", "batch_size", "seed"), ("num_workers", "strict")

# Options of every data set, without the libraries that its class needs; a test holds both equal.
DATA_OPTIONS: dict[str, tuple[str, ...]] = {
    "digits": (*_ALL, "split_seed", "validation", "test", "image_size"),
    "mnist": (*_ALL, "download", "validation", "image_size"),
    "fashion_mnist": (*_ALL, "download", "validation", "image_size"),
    "cifar10": (*_ALL, "download", "validation", "strict"),
    "cifar100": (*_ALL, "download", "validation"),
    "imagenet": (*_ALL, *_FILES, "image_size", "resize"),
    "cityscapes": (*_ALL, *_FILES, "image_size", "base_size", "scale", "test_split"),
    "image_folder": (*_ALL, *_FILES, "image_size", "resize"),
}

_WIDTH, _INDENT = 112, 26  # of help
_SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}

_OF_RUN = "Evaluate a trained network on its {} images: the best checkpoint of a run folder, or the checkpoint named."
# How each command is called, and what it does.
_COMMANDS = {
    "fit": (
        "--config RECIPE [options]\n"
        "e.g.:  netdeconv fit --config cifar10-20-epochs --network resnet18 --width 0.5 --norm bn --optimizer.lr 0.03",
        "Train a network. The same command goes on where it was stopped.",
    ),
    "validate": ("RUN|CHECKPOINT [options]", _OF_RUN.format("validation")),
    "test": ("RUN|CHECKPOINT [options]", _OF_RUN.format("test")),
}
_TRAINER = (
    "of Lightning's Trainer, e.g. --trainer.max_epochs N, --trainer.accelerator cpu, --trainer.precision bf16-mixed, "
    "--trainer.fast_dev_run true; --help-all lists them all"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """The network and how it is run.

    Args:
        network: small, vit, a network of the zoo, torchvision:NAME or timm:NAME.
        width: factor on the channels.
        norm: normalisation, by name.
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


class _Wide(DefaultHelpFormatter):
    """Help in lines of the length that this package's other texts have."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{**options, "width": _WIDTH, "max_help_position": _INDENT})


def settings_parser(command: str, trainer: type | None = None) -> ArgumentParser:
    """The parser of a command's options and of the files of settings.

    Args:
        command: ``"fit"``, ``"validate"`` or ``"test"``.
        trainer: Lightning's class, whose arguments are options as well. Without it, as it takes seconds to load, what
            follows ``--trainer.`` is not checked.
    """
    usage, description = _COMMANDS[command]
    parser = ArgumentParser(
        prog=f"netdeconv {command}",
        usage=f"netdeconv {command} {usage}",
        description=description,
        formatter_class=_Wide,
        exit_on_error=False,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-c", "--config", action="config", help="a recipe by its name, or a YAML file; the last one wins")
    add("--out", type=str | None, default=None, help="run folder, instead of runs/DATA-NETWORK-NORM")
    wanted = "checkpoint to begin with: last or best of the run folder, a path, or none"
    add("--ckpt_path", type=str | None, default=None, help=wanted)
    add("--seed_everything", type=bool | int, default=0, help="seed; true draws one")
    add("--data", type=dict[str, Any], default={}, help="data set, by name, and --data.OPTION of it")
    parser.add_class_arguments(Network, None)
    parser.add_class_arguments(Schedule, "schedule")
    parser.add_class_arguments(Checkpoints, "checkpoint")
    parser.add_subclass_arguments(
        (optim.Optimizer,), "optimizer", instantiate=False, fail_untyped=False, skip={"params"}
    )
    parser.set_defaults({"optimizer": _SGD})
    if trainer is None:
        add("--trainer", type=dict[str, Any], default={}, metavar=".OPTION", help=_TRAINER)
    else:
        parser.add_class_arguments(trainer, "trainer", instantiate=False, fail_untyped=False, sub_configs=True)
        # no evaluation before the first step: there are no statistics yet
        parser.set_defaults({"trainer.log_every_n_steps": 10, "trainer.num_sanity_val_steps": 0})
    return parser


def help_text(command: str) -> str:
    """What ``netdeconv COMMAND --help`` prints: the options, and the names that some of them take."""
    names = {
        "recipes, for --config": recipes(),
        "data sets, for --data, and the --data.OPTIONs of each; NETDECONV_DATA is a root for all": {
            name: ", ".join(options) for name, options in DATA_OPTIONS.items()
        },
        "networks, for --network": {
            "the zoo": ", ".join(zoo.NETWORKS),
            "others": "small, vit, torchvision:NAME, timm:NAME",
        },
        "normalisations, for --norm": {name: norm.text for name, norm in NORMS.items()},
        "optimizers, for --optimizer": {"torch.optim": "SGD and others, with --optimizer.lr, --optimizer.momentum, "
        "--optimizer.weight_decay, ...; --optimizer.help NAME lists what one takes"},
    }  # fmt: skip
    parts = [settings_parser(command).format_help()]
    for title, known in names.items():
        lines = [textwrap.fill(text, _WIDTH, initial_indent=f"  {name:<{_INDENT - 2}}", subsequent_indent=" " * _INDENT)
                 for name, text in known.items()]  # fmt: skip
        parts += [f"{title}:", *lines, ""]
    return "\n".join(parts)


def parsed(parser: ArgumentParser, words: Sequence[str], trainer: type) -> Namespace:
    """The settings.

    Args:
        parser: of :func:`settings_parser`.
        words: options with their values, ``--name=value``.
        trainer: Lightning's class.

    Raises:
        ConfigError: a value of another type; the message names the first option that is to blame.
    """
    try:
        return parser.parse_args(words)
    except ArgumentError as error:
        message = " ".join(str(error).split())
    before = parser.get_defaults()
    for count, word in enumerate(words, start=1):
        try:
            before = parser.parse_args(words[:count])
        except ArgumentError:
            option, _, value = word.removeprefix("--").partition("=")
            if option != "config":  # what is wrong in a file only the parser knows
                optimizer = getattr(optim, before.optimizer.class_path.rpartition(".")[2], None)
                takes = {"": Network, "schedule": Schedule, "checkpoint": Checkpoints, "trainer": trainer}
                message = refused(option.removesuffix("+"), value, {**takes, "optimizer": optimizer})
            break
    raise ConfigError(message)


def instantiated(parser: ArgumentParser, settings: Namespace) -> Namespace:
    """The settings with objects in the place of classes and their arguments."""
    make = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the name in older jsonargparse
    return make(settings)


def refused(option: str, value: Any, classes: Mapping[str, type | None]) -> str:
    """In a line: an option, what it takes, where a class says so, and what it got.

    Args:
        option: with its group, ``group.name``.
        value: of another type.
        classes: whose arguments the options of each group are.
    """
    group, _, name = option.rpartition(".")
    bases = getattr(classes.get(group), "__mro__", ())  # a class hands on what only its base names
    makers = (vars(base)["__init__"] for base in bases if "__init__" in vars(base))
    hint = next((hints[name] for hints in map(typing.get_type_hints, makers) if name in hints), None)
    got = "no value" if value == "" else value
    if hint is None:
        return f"--{option}: does not take {got}"
    expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    return f"--{option}: expected {expected}, got {got}"
