"""The demo's settings: a light file, so that the command line can check and explain them without heavy imports."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from netdeconv import ConfigError

__all__ = ["DemoSettings"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What the demo does; both methods get the same of everything.

    Args:
        epochs: passes over the training split.
        seeds: runs at every learning rate, seeds 0, 1, ...: initial weights and order of the batches.
        rates: learning rates tried for each method.
        batch_size, momentum, weight_decay: of SGD.
        width: channels of the first convolution.
        target: test accuracy, 0 to 1, for "epochs to reach".
        threads: threads that torch computes with. One is nearly as fast for a network this small, and is not
            slowed down by whatever else the machine does.

    Raises:
        ConfigError: a value out of range.
    """

    epochs: int = 5
    seeds: int = 3
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    batch_size: int = 64
    momentum: float = 0.9
    weight_decay: float = 5e-4
    width: int = 16
    target: float = 0.97
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("epochs", "seeds", "batch_size", "width", "threads"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"expected {name} of at least 1, got {value}")
        if not self.rates or not all(0 < rate < math.inf for rate in self.rates):
            raise ConfigError(f"expected learning rates above 0, got {list(self.rates)}")
        if len(set(self.rates)) < len(self.rates):
            raise ConfigError(f"expected learning rates that differ, got {list(self.rates)}")
        if not 0 < self.target < 1:
            raise ConfigError(f"expected a target accuracy between 0 and 1, got {self.target}")

    @classmethod
    def quick(cls, **overrides: Any) -> DemoSettings:
        """A shorter demo: fewer epochs, seeds and learning rates."""
        return cls(**{"epochs": 3, "seeds": 2, "rates": (0.01, 0.03, 0.1), **overrides})
