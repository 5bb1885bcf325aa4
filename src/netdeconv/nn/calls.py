"""What training steps were whitened by, for activation checkpointing, which runs them once more."""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import FunctionCtx

from netdeconv.errors import StatisticsError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Call", "Calls", "Checkpoint", "current_checkpoint", "in_backward"]

_KEPT = 1024
_TOLERANCE = 0.01  # of the largest mean


@dataclasses.dataclass(eq=False)
class Call:
    """One training step of a layer; all tensors are constants that nobody writes to.

    Attributes:
        key: mean patch of the batch.
        mean, scale, roots: what the step was whitened by; ``roots`` is ``None`` where it is a function of the batch.
        counts: whether the batch had statistics.
        turn: number of the refresh, where the step was one.
    """

    key: Tensor
    mean: Tensor
    scale: Tensor | None
    roots: tuple[Tensor, ...] | None
    counts: Tensor | bool
    turn: Tensor | None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The activation checkpoint that a forward runs in.

    Attributes:
        holder: an object that lives as long as what the checkpoint saves.
        repeats: whether this is its recomputation.
        within: holders of checkpoints that are made in there, and may ask for the same calls.
    """

    holder: Any
    repeats: bool
    within: tuple[Any, ...] = ()


class Calls:
    """The calls of one layer in activation checkpoints. A copy or pickle of a layer starts without any.

    A recomputation happens later than its forward, with other calls and refreshes in between, so it cannot use the
    statistics of the moment. Calls are kept by their checkpoint, in order, and die with it.
    """

    def __init__(self) -> None:
        self._recent: deque[weakref.ref[Call]] = deque(maxlen=_KEPT)

    def __reduce__(self) -> tuple[Any, ...]:
        return Calls, ()

    def alive(self) -> list[Call]:
        """Those that may be repeated, latest last."""
        return [call for call in (ref() for ref in self._recent) if call is not None]

    def add(self, checkpoint: Checkpoint, call: Call) -> None:
        """Keep a call for as long as the checkpoint that asks for it."""
        for holder in (*([] if checkpoint.repeats else [checkpoint.holder]), *checkpoint.within):
            self._of(holder)[0].append(call)
        self._recent.append(weakref.ref(call))

    def next(self, checkpoint: Checkpoint) -> Call | None:
        """The call that a recomputation has come to, ``None`` where the checkpoint has none."""
        calls, places = self._of(checkpoint.holder)
        task = torch._C._current_graph_task_id()  # a graph that is retained is recomputed in every backward pass
        place = places[task] = places.get(task, -1) + 1
        return calls[place] if place < len(calls) else None

    def nearest(self, checkpoint: Checkpoint, key: Tensor, label: str) -> Call | None:
        """The call of a batch with this mean patch, wanted in a checkpoint within one that is recomputed.

        ``None`` without any; or, in the backward pass of a function that is no checkpoint, of such a batch.

        Raises:
            StatisticsError: there is none of such a batch in a checkpoint.
        """
        calls = [call for call in self.alive() if call.key.shape == key.shape and call.key.device == key.device]
        if not calls:
            return None
        wanted = key.detach().nan_to_num()
        away = torch.stack([(call.key.nan_to_num() - wanted).abs().amax() for call in calls]).tolist()
        nearest = min(away)
        if nearest > _TOLERANCE * float(wanted.abs().amax()):
            if isinstance(checkpoint.holder, FunctionCtx) and "Checkpoint" not in type(checkpoint.holder).__name__:
                return None
            raise StatisticsError(
                f"{label}: expected the recomputation of an earlier training step in nested activation checkpoints, "
                "got another input. Leave random choices to torch's generators, or checkpoint without nesting."
            )
        return calls[len(away) - 1 - away[::-1].index(nearest)]

    def _of(self, holder: Any) -> tuple[list[Call], dict[int, int]]:
        kept = holder.__dict__.setdefault("_netdeconv_calls", {})
        found: tuple[list[Call], dict[int, int]] = kept.setdefault(id(self), ([], {}))
        return found


def current_checkpoint() -> Checkpoint | None:
    """The activation checkpoint that this forward runs in, the innermost one that is recomputed if any is.

    The one without reentrance puts hooks on the tensors that are saved, which know its frame; others, torch's reentrant
    one too, are autograd functions that run a forward without gradient, and again in their backward pass.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is not None:
        pack = getattr(hooks[0], "_torchdynamo_orig_callable", hooks[0])
        code, cells = getattr(pack, "__code__", None), getattr(pack, "__closure__", None) or ()
        known = {} if code is None else dict(zip(code.co_freevars, cells, strict=False))
        if "target_frame_ref" in known:
            return Checkpoint(known["target_frame_ref"].cell_contents(), True)
        if "frame" in known:
            return Checkpoint(known["frame"].cell_contents, False)
    if torch.is_grad_enabled() and not in_backward():
        return None
    within: list[Any] = []
    frame = sys._getframe(1)
    while frame is not None:
        if "ctx" in frame.f_code.co_varnames:
            found = frame.f_locals.get("ctx")
            if isinstance(found, FunctionCtx) and hasattr(found, "__dict__"):
                if frame.f_code.co_name == "backward":
                    return Checkpoint(found, True, tuple(within))
                within.append(found)
        frame = frame.f_back  # type: ignore[assignment]
    return Checkpoint(within[-1], False, tuple(within[:-1])) if within else None


def in_backward() -> bool:
    """Whether the autograd engine is running on this thread."""
    return torch._C._current_graph_task_id() != -1
