"""What is compared: a normalisation, and the optimiser it is trained with."""

from __future__ import annotations

from typing import Any, NamedTuple

from netdeconv import ConfigError
from netdeconv.lab.names import nearest
from netdeconv.lab.norms import NORMS
from netdeconv.lab.optimizers import OPTIMIZERS

__all__ = ["Method"]

# Of the optimisers that are not SGD: another marker and dash in the norm's colour.
_LINES: dict[str, dict[str, Any]] = {
    "adamw": {"marker": "1", "linestyle": ":"},
    "muon": {"marker": "2", "linestyle": "--"},
}


class Method(NamedTuple):
    """A normalisation, and the optimiser it is trained with.

    Args:
        norm: one of :data:`netdeconv.lab.norms.NORMS`.
        optimizer: one of :data:`netdeconv.lab.optimizers.OPTIMIZERS`.
    """

    norm: str
    optimizer: str = "sgd"

    @classmethod
    def named(cls, name: str) -> Method:
        """From ``"bn"``, with SGD, or ``"bn/muon"``.

        Raises:
            ConfigError: there is no such norm, or no such optimiser.
        """
        norm, _, optimizer = name.partition("/")
        if norm not in NORMS:
            raise ConfigError(f"{name}: there is no norm {norm}. {nearest(norm, NORMS)}")
        if (optimizer or "sgd") not in OPTIMIZERS:
            raise ConfigError(f"{name}: there is no optimiser {optimizer}. {nearest(optimizer, OPTIMIZERS)}")
        return cls(norm, optimizer or "sgd")

    def __str__(self) -> str:
        return self.norm if self.optimizer == "sgd" else f"{self.norm}/{self.optimizer}"

    @property
    def label(self) -> str:
        """In tables and pictures."""
        label = NORMS[self.norm].label
        return label if self.optimizer == "sgd" else f"{label}, {OPTIMIZERS[self.optimizer]}"

    @property
    def style(self) -> dict[str, Any]:
        """Of its line in pictures."""
        return {**NORMS[self.norm].style, **_LINES.get(self.optimizer, {})}
