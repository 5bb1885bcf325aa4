"""Reading the source of a model's forward: which functions run, and which modules their names stand for."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any, TypeAlias

from torch import nn

__all__ = ["Names", "bound_names", "forward_functions", "modules_meant"]

Names: TypeAlias = dict[str, list[nn.Module]]

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def forward_functions(module: nn.Module) -> tuple[ast.FunctionDef, ...]:
    """Syntax trees of a module's forward and of all its methods reachable from it, of base classes too."""
    kind: Any = type(module)
    return _functions_of(kind)


@functools.lru_cache(maxsize=4096)
def _functions_of(kind: Any) -> tuple[ast.FunctionDef, ...]:
    trees: dict[Any, ast.FunctionDef] = {}
    names, seen = ["forward"], {"forward"}
    while names:
        name = names.pop()
        for base in kind.__mro__:
            function = inspect.unwrap(vars(base).get(name, None)) if base is not nn.Module else None
            if not inspect.isfunction(function) or function in trees:
                continue
            tree = _parsed(function)
            if tree is None:
                continue
            trees[function] = tree
            for node in ast.walk(tree):
                if not isinstance(node, ast.Attribute) or node.attr in seen or hasattr(nn.Module, node.attr):
                    continue
                if isinstance(node.value, ast.Name) and inspect.isfunction(getattr(kind, node.attr, None)):
                    seen.add(node.attr)
                    names.append(node.attr)
    return tuple(tree for tree in trees.values() if tree.args.args)


def _parsed(function: Any) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


def bound_names(function: ast.FunctionDef, module: nn.Module) -> Names:
    """Names in this method of ``module`` that stand for modules; by loops over containers, for several."""
    names: Names = {function.args.args[0].arg: [module]}
    for node in ast.walk(function):  # names bound to modules, in the order of nesting: good enough
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    names.setdefault(target.id, []).extend(modules_meant(node.value, names))
        elif isinstance(node, (ast.For, ast.comprehension)):
            members = [
                child
                for part in ast.walk(node.iter)
                if isinstance(part, ast.expr)
                for container in modules_meant(part, names)
                if isinstance(container, _CONTAINERS)
                for child in container.children()
            ]
            for inner in ast.walk(node.target):
                if isinstance(inner, ast.Name):
                    names.setdefault(inner.id, []).extend(members)
    return names


def modules_meant(node: ast.expr, names: Names) -> list[nn.Module]:
    """The modules an expression like ``self.blocks[0].conv`` stands for."""
    found: list[Any] = []
    if isinstance(node, ast.Name):
        found = names.get(node.id, [])
    elif isinstance(node, ast.Attribute):
        found = [owner._modules.get(node.attr) for owner in modules_meant(node.value, names)]
    elif isinstance(node, ast.Subscript):
        for container in modules_meant(node.value, names):
            if not isinstance(container, _CONTAINERS):
                continue
            children = list(container.children())
            index = node.slice.value if isinstance(node.slice, ast.Constant) else None
            if isinstance(index, str):
                found.append(container._modules.get(index))
            elif isinstance(index, int) and -len(children) <= index < len(children):
                found.append(children[index])
            else:
                found += children
    return [module for module in found if isinstance(module, nn.Module)]
