"""Which layers a model uses other than by calling them: their weights are read in somebody's forward.

A whitened layer acts only where it is called. ``F.linear(x, self.fc.weight)`` would pass the whitening by, and
nothing would fail. Such layers are found beforehand in the source of ``forward`` and of what it calls; those that
this search does not see are found when the model first runs, by :mod:`netdeconv.surgery.first_run`.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from netdeconv.surgery.recognise import is_layer
from netdeconv.surgery.source import (
    Method,
    Names,
    bound_names,
    forward_functions,
    function_of,
    meant,
    modules_meant,
    parsed,
)

__all__ = ["normalises_by_function", "read_by_others"]

_READ = {"weight", "bias", "running_mean", "running_var", "_conv_forward"}
_READ_OF_LAYERS = {"parameters", "named_parameters", "_parameters", "get_parameter", "state_dict"}
_DEEPEST = 3  # helper functions that call helper functions
_BATCH_NORM: tuple[Any, ...] = (torch.nn.functional.batch_norm, torch.batch_norm)


def read_by_others(model: nn.Module) -> dict[nn.Module, str]:
    """Modules whose parameters another module's forward reads, with the reason in words.

    It sees ``self.a.b.weight``, ``getattr``, properties, names bound to such modules, lists and loops of them,
    and helper functions that are handed one. Code without source it does not see, and not what is put together
    from strings.
    """
    found: dict[nn.Module, str] = {}
    for module in model.modules():
        for method in forward_functions(module) if any(True for _ in module.children()) else ():
            for child, name in _reads(method, bound_names(method, module), 0):
                if child is not module:
                    found.setdefault(child, f"{type(module).__name__}.{method.tree.name} reads its {name} itself")
    return found


def normalises_by_function(module: nn.Module) -> str | None:
    """The method of a module that calls torch's function ``batch_norm``, on statistics that no child keeps."""
    for method in forward_functions(module):
        for node in method.nodes:
            called = _named(node.func, method.function.__globals__) if isinstance(node, ast.Call) else None
            if any(called is function for function in _BATCH_NORM):
                names = bound_names(method, module)
                given = (*node.args, *(word.value for word in node.keywords))
                owners = [
                    owner
                    for part in given
                    if isinstance(part, ast.Attribute)
                    for owner in modules_meant(part.value, names)
                ]
                if all(owner is module for owner in owners):
                    return f"{type(module).__name__}.{method.tree.name}"
    return None


def _named(node: ast.expr, known: dict[str, Any]) -> Any:
    """What a name among a function's globals stands for, or a dotted one through modules; else ``None``.

    Other objects are not asked for attributes: properties run code, and those of a dependency that is not there raise.
    """
    if isinstance(node, ast.Name):
        return known.get(node.id)
    owner = _named(node.value, known) if isinstance(node, ast.Attribute) else None
    if isinstance(node, ast.Attribute) and issubclass(type(owner), types.ModuleType):
        with contextlib.suppress(Exception):  # of modules that import on demand
            return getattr(owner, node.attr, None)
    return None


def _reads(method: Method, names: Names, depth: int) -> Iterator[tuple[nn.Module, str]]:
    """Modules whose weight, bias or statistics this function reads, or one that it hands them to; and which of them."""
    for node in method.nodes:
        if node in method.harmless:
            continue
        if isinstance(node, ast.Attribute) and node.attr in _READ:
            yield from ((child, node.attr) for child in modules_meant(node.value, names))
        elif isinstance(node, ast.Attribute) and node.attr in _READ_OF_LAYERS:
            yield from ((child, "weight") for child in modules_meant(node.value, names) if is_layer(child))
        elif isinstance(node, ast.Call):
            name = node.args[1].value if len(node.args) > 1 and isinstance(node.args[1], ast.Constant) else None
            if isinstance(node.func, ast.Name) and node.func.id == "getattr" and name in _READ:
                yield from ((child, str(name)) for child in modules_meant(node.args[0], names))
            elif depth < _DEEPEST:
                yield from _reads_of_callee(node, method, names, depth)


def _reads_of_callee(call: ast.Call, caller: Method, names: Names, depth: int) -> Iterator[tuple[nn.Module, str]]:
    """What a function reads that is handed modules."""
    values = [meant(part, names) for part in call.args]
    words = {word.arg: meant(word.value, names) for word in call.keywords if word.arg}
    if not any((*values, *words.values())):
        return
    for function, owner in _callees(call.func, caller, names):
        method = parsed(function)
        if method is None or function.__module__.partition(".")[0] == "torch":
            continue
        given = [[owner], *values] if owner is not None else values
        parameters = [argument.arg for argument in method.tree.args.args]
        bound = dict(zip(parameters, given, strict=False)) | words
        if method.tree.args.vararg is not None:
            bound[method.tree.args.vararg.arg] = [[item for value in given[len(parameters) :] for item in value]]
        yield from _reads(method, bound_names(method, bound), depth + 1)


def _callees(func: ast.expr, caller: Method, names: Names) -> Iterator[tuple[Any, nn.Module | None]]:
    """The Python functions that a call may run, with the module whose method it is."""
    known = caller.function.__globals__
    function = function_of(known.get(func.id)) if isinstance(func, ast.Name) else None
    if function is not None:
        yield function, None
    if isinstance(func, ast.Attribute):
        function = function_of(_named(func, known)) if isinstance(func.value, ast.Name) else None
        if function is not None:
            yield function, None
        for owner in modules_meant(func.value, names):
            static = isinstance(inspect.getattr_static(type(owner), func.attr, None), staticmethod)
            function = function_of(getattr(type(owner), func.attr, None))
            if function is not None and not hasattr(nn.Module, func.attr):
                yield function, None if static else owner
