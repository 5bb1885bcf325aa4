"""The command ``netdeconv reproduce cifar``: its arguments and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from netdeconv.lab.experiments.cifar_settings import METHODS, CifarSettings
from netdeconv.lab.options import add_options

__all__ = ["HELP", "add_arguments", "run"]

HELP = "CIFAR-10: a network with batch normalisation, network deconvolution, and the published procedure."

_HELPS = {
    "network": ("NAME", "network of the zoo"),
    "width": ("FACTOR", "factor on the number of channels"),
    "methods": ("METHOD", f"out of {', '.join(METHODS)}"),
    "rates": ("RATE", "learning rates"),
    "seeds": ("N", "runs at every learning rate"),
    "epochs": ("N", "passes over the training images"),
    "batch_size": ("N", "images in a training batch"),
    "weight_decay": ("X", "of SGD"),
    "threads": ("N", "threads to compute with"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for every setting, and where to write."""
    parser.add_argument(
        "--out", type=Path, default=Path("runs/cifar"), metavar="DIR", help="run folder (default: runs/cifar)"
    )
    add_options(parser, CifarSettings, _HELPS)


def run(args: argparse.Namespace) -> int:
    """Train, print the table; the exit code."""
    given: dict[str, Any] = {}
    for name in _HELPS.keys() & vars(args).keys():
        value = getattr(args, name)
        given[name] = tuple(value) if isinstance(value, list) else value
    settings = CifarSettings(**given)
    from netdeconv.lab.experiments.cifar import run_cifar, table

    print(table(run_cifar(args.out, settings)))
    return 0
