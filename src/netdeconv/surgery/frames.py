"""What the frames on a thread's stack tell: who runs, and from where."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn

__all__ = ["call_of", "has_ended", "in_forward_of", "in_functional_call", "place_of_use"]

# Frames in these folders are not where a user would look.
_INSIDE = (os.path.dirname(os.path.dirname(__file__)) + os.sep, os.path.dirname(torch.__file__) + os.sep)


def _frames() -> Iterator[Any]:
    """From the caller's caller outwards."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def call_of() -> FrameType:
    """The frame of torch that calls the module whose hook asks: an inner function's, or the hook's caller itself."""
    _, *above = _frames()
    calls = (frame for frame in above if frame.f_code is nn.Module._call_impl.__code__)
    return next(calls, above[0])


def has_ended(frame: FrameType) -> bool:
    """Whether a function has returned, in whatever thread: Python clears no frame that runs."""
    try:
        frame.clear()
    except RuntimeError:
        return False
    return True


def in_forward_of(owners: list[nn.Module]) -> bool:
    """Whether a forward of one of these runs that was called directly, past the hooks."""
    for frame in _frames():
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            if any(first is owner for owner in owners):
                return True
    return False


def in_functional_call() -> bool:
    """Whether ``torch.func.functional_call`` has put other tensors, parameters or buffers, into a module."""
    return any(frame.f_globals.get("__name__") == "torch.nn.utils.stateless" for frame in _frames())


def place_of_use() -> str:
    """Where in the user's code, or another library's, the operation stands."""
    *_, outermost = frames = list(_frames())
    outside = (frame for frame in frames if not os.path.abspath(frame.f_code.co_filename).startswith(_INSIDE))
    frame = next(outside, outermost)
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"
