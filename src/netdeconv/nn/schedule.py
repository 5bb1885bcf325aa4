"""When the statistics are refreshed: a clock that eager and compiled training steps can both read."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

__all__ = ["Clock", "interval"]

_DENSE_STEPS = 16
_clocks: weakref.WeakValueDictionary[int, Clock] = weakref.WeakValueDictionary()
_ids = itertools.count()


def interval(step: int, update_every: int) -> int:
    """Distance of refreshes at a training step: 1 for the first 16, then doubling up to ``update_every``.

    >>> [interval(step, 16) for step in (0, 15, 16, 32, 64, 128, 10_000)]
    [1, 1, 2, 4, 8, 16, 16]
    """
    doublings = max(0, (step // (_DENSE_STEPS // 2)).bit_length() - 1)
    return int(min(update_every, 2**doublings))


class Clock:
    """Counts training steps and says whether the next one is due for a refresh.

    ``due`` is a plain bool: a compiled forward is specialised on it, so that there is one graph with the
    refresh and one without, and no other. A compiled graph cannot run Python, so there the clock is advanced by
    the operator ``netdeconv::tick``, which finds it by its number.
    The number is a tensor, on the CPU: as a plain int every clock would need a graph of its own.
    """

    def __init__(self, update_every: int, steps: int = 0) -> None:
        self.update_every = update_every
        number = next(_ids)
        _clocks[number] = self
        self.pulse = torch.tensor(number)
        self.set(steps)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is another clock that shows the same time."""
        return Clock, (self.update_every, self.steps)

    def set(self, steps: int) -> None:
        """Move to this number of finished training steps."""
        self.steps = steps
        self.due = self._is_due(steps)
        self.was_due = steps > 0 and self._is_due(steps - 1)

    def advance(self) -> None:
        """One training step has begun."""
        if torch.compiler.is_compiling():
            torch.ops.netdeconv.tick(self.pulse)
        else:
            self.set(self.steps + 1)

    def _is_due(self, step: int) -> bool:
        return step % interval(step, self.update_every) == 0


def _tick(pulse: Tensor) -> None:
    found = _clocks.get(int(pulse))
    if found is not None:
        found.set(found.steps + 1)


# It claims to write to `pulse`, or the compiler would drop an operator without a result; and not to the saved
# counter, whose reads Inductor has been seen to move behind the operator (torch 2.15). A captured CUDA graph
# would not replay the Python in here, so the compiler must run it between graphs.
_op = torch.library.custom_op("netdeconv::tick", _tick, mutates_args=("pulse",), tags=(torch.Tag.cudagraph_unsafe,))
_op.register_fake(lambda pulse: None)
