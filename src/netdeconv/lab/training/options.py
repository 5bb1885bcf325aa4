"""The options of fit, validate and test that are this package's own; light, so that mistakes in them answer at once."""

from __future__ import annotations

import dataclasses
from typing import Any

from netdeconv import ConfigError

__all__ = ["DATA_OPTIONS", "PLAIN_OPTIONS", "Checkpoints", "Network"]

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

# Beside the fields of Network, and the groups data, whitening, optimizer, schedule, checkpoint and trainer.
PLAIN_OPTIONS = ("config", "data", "seed_everything", "out", "ckpt_path", "optimizer", "print_config", "help")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """The network and how it is run.

    Args:
        network: small, a network of the zoo, or torchvision:NAME.
        width: factor on the channels.
        norm: normalisation: bn, nd, nd-paper, nd-authors, gn, ln, in, iternorm, dbp, swbn, gn+ws, none.
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
