"""How the tests of training may be varied: they hold for other seeds, and for inputs moved a little."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Variation(NamedTuple):
    """What ``--training-seed`` and ``--nudge`` ask for."""

    seed: int = 0
    nudge: float = 0.0

    def moved(self, x: Tensor) -> Tensor:
        """The input, every value moved by noise of standard deviation ``nudge``."""
        noise = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(self.seed))
        return x + self.nudge * noise
