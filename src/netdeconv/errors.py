"""Errors and warnings. Every message says what was expected, what it got, where, and what to do."""

from __future__ import annotations

__all__ = ["ConfigError", "NonFiniteWarning", "NumericalError", "ShapeError", "StatisticsError", "StatisticsWarning"]


class ConfigError(ValueError):
    """A setting that is out of range, unknown, or in conflict with another."""


class ShapeError(ValueError):
    """A tensor whose number of dimensions or channels does not fit the layer."""


class StatisticsError(RuntimeError):
    """Whitening statistics are missing, or those of several processes do not belong together."""


class NumericalError(ArithmeticError):
    """A computation that failed numerically, such as a root that does not exist."""


class NonFiniteWarning(RuntimeWarning):
    """A batch with NaN, infinite or constant values was left out of the running statistics."""


class StatisticsWarning(UserWarning):
    """A network was evaluated before its first training step, with whitening statistics that are the identity."""
