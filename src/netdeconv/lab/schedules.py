"""How the learning rate falls from the first training step to the last."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from netdeconv import ConfigError

__all__ = ["SCHEDULES", "Schedule"]

SCHEDULES = ("cosine", "poly", "steps", "constant")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Factor on the learning rate, as a function of the share of the optimizer steps that are done.

    Args:
        name: ``"cosine"``: half a cosine from 1 to 0; ``"poly"``: ``(1 - share) ** power``; ``"steps"``: times
            ``gamma`` at every milestone; ``"constant"``: 1.
        power: of ``"poly"``.
        milestones: shares of the training at which ``"steps"`` falls.
        gamma: what ``"steps"`` multiplies by.

    Raises:
        ConfigError: a value out of range or unknown.
    """

    name: str = "cosine"
    power: float = 0.9
    milestones: tuple[float, ...] = (1 / 3, 2 / 3)
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise ConfigError(f"schedule: expected a name out of {', '.join(SCHEDULES)}, got {self.name!r}")
        if not 0 < self.power < math.inf:
            raise ConfigError(f"schedule: expected a power above 0, got {self.power}")
        if not 0 < self.gamma < math.inf:
            raise ConfigError(f"schedule: expected gamma above 0, got {self.gamma}")
        if not all(0 < share < 1 for share in self.milestones):
            raise ConfigError(f"schedule: expected milestones between 0 and 1, got {list(self.milestones)}")

    def factor(self, step: int, steps: float) -> float:
        """Factor for the optimizer step number ``step`` out of ``steps``, counted from 0."""
        share = min(step / steps, 1.0)
        if self.name == "cosine":
            return 0.5 * (1 + math.cos(math.pi * share))
        if self.name == "poly":
            return (1 - share) ** self.power
        if self.name == "steps":
            return self.gamma ** sum(share >= milestone for milestone in self.milestones)
        return 1.0

    def scheduler(self, optimizer: Optimizer, steps: Callable[[], float]) -> LambdaLR:
        """torch's scheduler, to be stepped after every optimizer step.

        Args:
            optimizer: whose learning rates are the start.
            steps: tells the number of optimizer steps. It is first asked after the first step: Lightning, asked
                earlier, sets up the training data before it knows where a stopped run has to go on in them.
        """
        return LambdaLR(optimizer, lambda step: self.factor(step, steps()) if step else 1.0)
