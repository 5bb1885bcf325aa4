"""A look at the first forward of a converted model: does it use the layers as the conversion took for granted?"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
from torch import nn

from netdeconv.nn import ChannelWhitening, Whitening
from netdeconv.nn.layer import WhitenedLayer
from netdeconv.surgery.reads import WeightReads

__all__ = ["FirstRun"]

_WHITENED = (WhitenedLayer, ChannelWhitening, Whitening)


class FirstRun:
    """Watches, once, what a model does with its whitened layers' weights, and warns of any that are read elsewhere.

    Where the source shows it, :func:`netdeconv.plan_conversion` leaves such layers. The rest is seen here, when
    the model, or the part of it that is called on its own, first runs outside ``torch.compile``. Then
    nothing of this is left on the model.

    Warns:
        UserWarning: something else than the layer uses its weight, which no whitening reaches there.
    """

    def __init__(self) -> None:
        self._top: nn.Module | None = None
        self._depth = 0
        self._caller: FrameType | None = None
        self._watch: WeightReads | None = None

    @classmethod
    def install(cls, model: nn.Module) -> None:
        """Watch every module of the model that has modules inside, whichever is called first."""
        cls.remove(model)
        watcher = cls()
        for module in model.modules():
            if any(True for _ in module.children()) and not isinstance(module, _WHITENED):
                module.register_forward_pre_hook(watcher.before, prepend=True)
                module.register_forward_hook(watcher.after, always_call=True)

    @classmethod
    def remove(cls, model: nn.Module) -> None:
        """Take the hooks off a model and everything inside."""
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), cls)]:
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)

    def before(self, module: nn.Module, args: Any) -> None:
        """Hook: the outermost call begins, or one inside it."""
        if torch.compiler.is_compiling():
            return
        if self._watch is not None and not _is_running(self._caller):
            self._give_up()  # Ctrl-C runs no hook
        if self._watch is None:
            layers = [layer for layer in module.modules() if isinstance(layer, WhitenedLayer)]
            self._top, self._depth, self._caller = module, 0, sys._getframe(1)
            self._watch = WeightReads(module, layers)
            self._watch.__enter__()
        self._depth += module is self._top

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hook: a call ends; ``output`` is ``None`` where it failed."""
        if torch.compiler.is_compiling() or module is not self._top or self._watch is None:
            return
        self._depth -= 1
        if self._depth:
            return
        found = self._watch.found
        self._give_up()
        if output is not None:
            self.remove(module)
            _warn(found)

    def _give_up(self) -> None:
        """Stop watching."""
        watch, self._top, self._caller, self._watch = self._watch, None, None, None
        if watch is not None:
            watch.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> FirstRun:
        return memo.setdefault(id(self), FirstRun())  # whatever runs at the moment does so on the original

    def __getstate__(self) -> dict[str, Any]:
        return vars(FirstRun())


def _is_running(frame: FrameType | None) -> bool:
    """Whether a call has not ended yet."""
    current: FrameType | None = sys._getframe(1)
    while current is not None and current is not frame:
        current = current.f_back
    return current is not None


def _warn(found: Mapping[nn.Module, str]) -> None:
    if not found:
        return
    passed = [f"{getattr(layer.whitening, 'label', layer)} at {place}" for layer, place in found.items()]
    shown = "; ".join(passed[:5]) + (f"; and {len(passed) - 5} more" if len(passed) > 5 else "")
    warnings.warn(
        f"convert: expected the weights of whitened layers to be used by these layers alone, got {len(passed)} that "
        f"something else read: {shown}. No whitening reaches them there, and fuse would change what is read. "
        "Convert again with exclude= for these layers, unless they are only looked at, for a penalty or a log.",
        UserWarning,
        stacklevel=6,  # the caller of the model
    )
