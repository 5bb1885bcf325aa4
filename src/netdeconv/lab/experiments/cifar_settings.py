"""Settings of the CIFAR-10 comparison: a light file, so that the command line can check them at once."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from netdeconv import ConfigError

__all__ = ["METHODS", "CifarSettings"]

METHODS = {"bn": "BatchNorm", "nd": "network deconvolution", "paper": "published procedure"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CifarSettings:
    """What is trained: every method at every rate with every seed, all with the paper's other settings.

    Args:
        network: a network of the zoo.
        width: factor on its channels.
        methods: out of :data:`METHODS`.
        rates: learning rates. There is no validation part, as in the paper: the best rate is the best on the test
            images, for every method alike.
        seeds: seeds 0, 1, ...: initial weights, order and augmentation of the batches.
        epochs: passes over the training images; the learning rate falls to zero on a cosine over all steps.
        batch_size, weight_decay: of SGD with momentum 0.9.
        threads: threads that torch computes with.

    Raises:
        ConfigError: a value out of range.
    """

    network: str = "vgg11"
    width: float = 1.0
    methods: tuple[str, ...] = tuple(METHODS)
    rates: tuple[float, ...] = (0.1, 0.05, 0.02, 0.01)
    seeds: int = 2
    epochs: int = 1
    batch_size: int = 128
    weight_decay: float = 1e-3
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs", "batch_size", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if not self.rates or not all(0 < rate < math.inf for rate in self.rates):
            raise ConfigError(f"expected learning rates above 0, got {list(self.rates)}")
        if len(set(self.rates)) < len(self.rates):
            raise ConfigError(f"expected learning rates that differ, got {list(self.rates)}")
        if not 0 < self.width <= 4:
            raise ConfigError(f"expected a width above 0 and up to 4, got {self.width}")
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown or not self.methods:
            raise ConfigError(f"expected methods out of {', '.join(METHODS)}, got {list(self.methods)}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)
