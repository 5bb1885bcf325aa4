"""What recent training steps were whitened by, for activation checkpointing, which runs them once more."""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import TYPE_CHECKING, Any

import torch

from netdeconv.errors import StatisticsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["Call", "Calls", "in_backward", "may_be_repeated"]

_KEPT = 128
_TOLERANCE = 0.01  # of the largest mean: nondeterministic kernels, reversible networks


@dataclasses.dataclass
class Call:
    """One training step of a layer; all tensors are constants that nobody writes to.

    Attributes:
        key: mean patch of the batch, by which the call is found again.
        mean, scale, roots: what the step was whitened by; ``roots`` is ``None`` where it is a function of the batch.
        counts: whether the batch had statistics.
        turn: number of the refresh, where the step was one.
        repeated: how often it has been run again.
    """

    key: Tensor
    mean: Tensor
    scale: Tensor | None
    roots: tuple[Tensor, ...] | None
    counts: Tensor | bool
    turn: Tensor | None
    repeated: int = 0


class Calls:
    """The calls that may be repeated, latest last. A copy or pickle of a layer starts without any.

    A recomputation happens later than its forward, with other calls and refreshes in between, so it cannot use the
    statistics of the moment; and torch does not say which call it repeats. What it does repeat is the input, so a call
    is found by the mean of its batch, and among equal ones the latest comes first, as in a backward pass.
    """

    def __init__(self) -> None:
        self._kept: deque[Call] = deque(maxlen=_KEPT)
        self._roots_of: list[tuple[int, int]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return Calls, ()

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget all calls."""
        self._kept.clear()
        self._roots_of = []

    def add(self, call: Call, buffers: Sequence[Tensor]) -> None:
        """Keep a call, and forget those that have been repeated: their backward pass is over.

        Args:
            call: its ``roots`` may be the buffers themselves, of which a copy is kept.
            buffers: where roots are remembered.
        """
        while self._kept and self._kept[0].repeated:
            self._kept.popleft()
        if call.roots is not None and any(root is buffer for root in call.roots for buffer in buffers):
            versions = [(buffer.data_ptr(), buffer._version) for buffer in buffers]
            last = self._kept[-1].roots if self._kept and versions == self._roots_of else None
            call.roots = last or tuple(root.detach().clone() for root in call.roots)
            self._roots_of = versions
        else:
            self._roots_of = []
        self._kept.append(call)

    def repeated(self, key: Tensor, label: str) -> Call:
        """The call of a batch with this mean patch.

        Raises:
            StatisticsError: there is none.
        """
        wanted = key.detach().nan_to_num()
        away = torch.stack([(call.key.nan_to_num() - wanted).abs().amax() for call in self._kept]).tolist()
        nearest = min(away)
        if nearest > _TOLERANCE * float(wanted.abs().amax()):
            raise StatisticsError(
                f"{label}: expected the recomputation of one of the last {len(self)} training steps of this layer, got "
                "another input in a backward pass. Checkpoint with use_reentrant=False, run the backward pass before "
                f"{_KEPT} more forward passes, and leave random choices to torch's generators."
            )
        equal = [call for call, distance in zip(self._kept, away, strict=True) if distance == nearest]
        call = min(reversed(equal), key=lambda call: call.repeated)
        call.repeated += 1
        return call


def may_be_repeated() -> bool:
    """Whether the forward pass that is running may be run again: it records no gradient, or nothing for it.

    So do both kinds of checkpoint: without gradient, and with hooks that drop the tensors that are saved for it.
    """
    if torch.is_inference_mode_enabled():
        return False
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def in_backward() -> bool:
    """Whether the autograd engine is running on this thread."""
    return torch._C._current_graph_task_id() != -1
