"""Which layers a model uses other than by calling them: their weights are read in somebody's forward.

A whitened layer acts only where it is called. ``F.linear(x, self.fc.weight)`` would pass the whitening by, and
nothing would fail, so such layers have to be found beforehand. They are found in the source of ``forward`` and
of the methods it calls.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from torch import nn

from netdeconv.surgery.source import bound_names, forward_functions, modules_meant

__all__ = ["read_by_others"]

_READ = {"weight", "bias", "running_mean", "running_var", "_conv_forward"}
# Looking at these says nothing about the numbers.
_HARMLESS = {"device", "dtype", "shape", "size", "dim", "ndim", "numel", "is_cuda", "requires_grad", "type"}


def read_by_others(model: nn.Module) -> dict[nn.Module, str]:
    """Modules whose parameters another module's forward reads, with the reason in words.

    It sees ``self.a.b.weight``, ``self.layers[0].weight``, names bound to such modules, and loops over
    containers. Code without source, and modules handed to a function that reads them, it does not see.
    """
    found: dict[nn.Module, str] = {}
    for module in model.modules():
        for function in forward_functions(module) if module._modules else ():
            for child, name in _reads(function, module):
                if child is not module:
                    found.setdefault(child, f"{type(module).__name__}.{function.name} reads its {name} itself")
    return found


def _reads(function: ast.FunctionDef, module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Modules whose weight, bias or statistics this method reads, and which of them."""
    names = bound_names(function, module)
    harmless = set(_harmless(function))
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and node.attr in _READ and node not in harmless:
            for child in modules_meant(node.value, names):
                yield child, node.attr


def _harmless(function: ast.FunctionDef) -> Iterator[ast.expr]:
    """Reads that only ask for dtype or shape, or whether there is a tensor at all; and what is written to."""
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute):
            if node.attr in _HARMLESS:
                yield node.value
            if not isinstance(node.ctx, ast.Load):
                yield node
        elif isinstance(node, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
            yield node.left
