"""Which layers' weights are read by somebody else than the layer, found by watching a model run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._pytree import tree_leaves

from netdeconv.surgery.dataflow import looks_only

__all__ = ["WeightReads"]

# Frames in these folders are not where a user would look.
_INSIDE = (os.path.dirname(os.path.dirname(__file__)) + os.sep, os.path.dirname(torch.__file__) + os.sep)


class WeightReads(TorchFunctionMode):
    """A context in which a model is run; afterwards ``found`` says which layers' weights others have read, and where.

    Every operation passes by here with its arguments. One that gets the weight or bias of a layer while neither
    the layer nor another owner of the same parameter is running passes the layer by. However the parameter was come
    by (through a property, a list, a helper, a loop over ``parameters()``), it is the same object.

    Args:
        model: whose modules may share the layers' parameters.
        layers: the layers whose parameters are watched.

    Attributes:
        found: for every layer passed by, a place in the source, as ``file.py:12 in forward``.
    """

    def __init__(self, model: nn.Module, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.found: dict[nn.Module, str] = {}
        watched = set(layers)
        self._owners: dict[int, list[nn.Module]] = {}
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                self._owners.setdefault(id(parameter), []).append(module)
        self._layers = {
            key: [module for module in owners if module in watched]
            for key, owners in self._owners.items()
            if not watched.isdisjoint(owners)
        }
        self._running: list[nn.Module] = []
        self._handles: list[Any] = []

    def __enter__(self) -> WeightReads:
        for module in {owner for key in self._layers for owner in self._owners[key]}:
            self._handles.append(module.register_forward_pre_hook(self._start, prepend=True))
            self._handles.append(module.register_forward_hook(self._stop, always_call=True))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._running.clear()

    def close(self) -> None:
        """Leave the context from where it may not be the innermost one any more: then it stays, and does nothing."""
        self._layers = {}
        if _get_current_function_mode() is self:
            self.__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not looks_only(func):
            for leaf in tree_leaves((args, kwargs)):
                if id(leaf) in self._layers and isinstance(leaf, Tensor) and not _asks_for_type(func, args, leaf):
                    self._read(id(leaf))
        return func(*args, **kwargs)

    def _read(self, key: int) -> None:
        if not any(module in self._running for module in self._owners[key]):
            place = _place()
            for layer in self._layers[key]:
                self.found.setdefault(layer, place)

    def _start(self, module: nn.Module, args: Any) -> None:
        self._running.append(module)

    def _stop(self, module: nn.Module, args: Any, output: Any) -> None:
        if module in self._running:
            self._running.remove(module)


def _asks_for_type(func: Any, args: Any, parameter: Tensor) -> bool:
    """``x.to(weight)`` and the like: the numbers are not read."""
    return func in (Tensor.to, Tensor.type_as) and bool(args) and args[0] is not parameter


def _place() -> str:
    """Where in the user's code, or another library's, the operation stands."""
    frame = sys._getframe(2)
    while frame.f_back is not None and os.path.abspath(frame.f_code.co_filename).startswith(_INSIDE):
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"
