"""When the statistics are refreshed: by a counter in a buffer, for eager and compiled training steps."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from netdeconv.functional.tracing import readable

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
    """Says whether the next training step is due for a refresh, by a buffer that counts the steps.

    The buffer is the truth, whoever writes to it: on a CPU it is read at every step; on other devices, where that
    would mean to wait, whenever its version has changed (writes through ``.data`` have none, and are seen when the mode
    changes). A compiled graph cannot read it. There ``due`` is a plain bool that the forward is specialised on, so that
    there is one graph with the refresh and one without, and the operator ``netdeconv::tick`` moves it, which finds
    the clock by its number. The number is a tensor, on the CPU: as a plain int every clock would need a graph of its
    own. A buffer that was written to between compiled steps is noticed by the first of them, on a CPU.

    Attributes:
        steps: finished training steps.
        due: whether the next one is due.
        updated: whether statistics are known to have been gathered.
    """

    def __init__(self, update_every: int, steps: int = 0) -> None:
        self.update_every = update_every
        number = next(_ids)
        _clocks[number] = self
        self.pulse = torch.tensor(number, device="cpu")
        self._seen: tuple[int, int] | None = None
        self._owner: Callable[[], Any] = lambda: None
        self.set(steps)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is another clock that shows the same time."""
        return Clock, (self.update_every, self.steps)

    def serve(self, owner: Any) -> None:
        """Belong to the module whose buffer ``num_steps`` is counted by."""
        self._owner = weakref.ref(owner)

    def set(self, steps: int) -> None:
        """Move to this number of finished training steps."""
        self.steps = steps
        self.due = steps % interval(steps, self.update_every) == 0
        self.updated = False

    def follow(self, num_steps: Tensor, num_updates: Tensor, *, look: bool = False) -> None:
        """Move to what the buffers say, where they can be read and may have changed.

        Args:
            num_steps: counts finished training steps.
            num_updates: counts refreshes.
            look: read them wherever they are.
        """
        if not readable(num_steps):
            return
        on_cpu, mark = num_steps.device.type == "cpu", _mark(num_steps)
        if not (on_cpu or look or mark is None or self._seen != mark):
            return
        steps = int(num_steps)
        if steps != self.steps or look:
            self.set(steps)
        self.updated = self.updated or bool(num_updates > 0)
        self._seen = mark

    def advance(self, num_steps: Tensor) -> None:
        """One training step has begun, and the buffer has been told."""
        self._count()
        self._seen = _mark(num_steps)

    def advance_in_graph(self) -> None:
        """:meth:`tick`, in a compiled graph."""
        torch.ops.netdeconv.tick(self.pulse)

    def tick(self) -> None:
        """One compiled training step has begun, and the buffer is about to be told."""
        owner = self._owner()
        if owner is not None and owner.num_steps.device.type == "cpu" and readable(owner.num_steps):
            steps = int(owner.num_steps)
            if steps not in (self.steps, self.steps + 1):
                self.set(steps)
        self._count()

    def _count(self) -> None:
        updated = self.updated
        self.set(self.steps + 1)
        self.updated = updated


def _mark(counter: Tensor) -> tuple[int, int] | None:
    """What tells that nobody has written to it; ``None`` where nothing does."""
    if counter.is_inference() or not readable(counter):
        return None
    return counter.data_ptr(), counter._version


def _tick(pulse: Tensor) -> None:
    found = _clocks.get(int(pulse))
    if found is not None:
        found.tick()


# It claims to write to `pulse`, or the compiler would drop an operator without a result; and not to the saved
# counter, whose reads Inductor has been seen to move behind the operator (torch 2.15). A captured CUDA graph
# would not replay the Python in here, so the compiler must run it between graphs.
_op = torch.library.custom_op("netdeconv::tick", _tick, mutates_args=("pulse",), tags=(torch.Tag.cudagraph_unsafe,))
_op.register_fake(lambda pulse: None)
