"""Reading the source of a model's forward: which functions run, and which modules their expressions stand for."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any, TypeAlias

from torch import nn

__all__ = [
    "Method",
    "Names",
    "bound_names",
    "forward_functions",
    "function_of",
    "loop_parts",
    "meant",
    "members",
    "modules_meant",
    "parsed",
]

Names: TypeAlias = dict[str, list[Any]]  # of modules, and of lists, tuples and mappings of modules

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
# Looking at these says nothing about the numbers.
_HARMLESS = {"device", "dtype", "shape", "size", "dim", "ndim", "numel", "is_cuda", "requires_grad"}
_ASKING = {"isinstance", "hasattr", "len", "type"}
_DEEPEST = 4  # calls of methods in methods
_NAMED_MEMBERS = {"items", "named_children", "named_modules"}
_MEMBERS = {"children", "modules", "values", *_NAMED_MEMBERS}
_PASSING_ON = {"enumerate", "filter", "iter", "list", "map", "reversed", "set", "sorted", "tuple", "zip"}


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """A function, its syntax tree, and all nodes of the tree in the order of ``ast.walk``."""

    tree: ast.FunctionDef
    function: Any
    nodes: tuple[Any, ...]

    @functools.cached_property
    def harmless(self) -> frozenset[ast.AST]:
        """Reads that only ask for dtype or shape, or whether there is a tensor at all; and what is written to."""
        found: set[ast.AST] = set()
        for node in self.nodes:
            if isinstance(node, ast.Attribute):
                if node.attr in _HARMLESS:
                    found |= set(ast.walk(node.value))
                if not isinstance(node.ctx, ast.Load):
                    found.add(node)
            elif isinstance(node, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
                found |= set(ast.walk(node.left))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ASKING:
                found |= set(ast.walk(node))
        return frozenset(found)


def forward_functions(module: nn.Module) -> tuple[Method, ...]:
    """A module's forward and all its methods and properties reachable from it, of base classes too."""
    kind: Any = type(module)
    return _functions_of(kind)


@functools.lru_cache(maxsize=4096)
def _functions_of(kind: Any) -> tuple[Method, ...]:
    found: dict[Any, Method] = {}
    names, seen = ["forward"], {"forward"}
    while names:
        name = names.pop()
        for base in kind.__mro__:
            method = parsed(function_of(vars(base).get(name))) if base is not nn.Module else None
            if method is None or method.function in found:
                continue
            found[method.function] = method
            for node in method.nodes:
                if not isinstance(node, ast.Attribute) or node.attr in seen or hasattr(nn.Module, node.attr):
                    continue
                if isinstance(node.value, ast.Name) and function_of(getattr(kind, node.attr, None)) is not None:
                    seen.add(node.attr)
                    names.append(node.attr)
    return tuple(method for method in found.values() if method.tree.args.args)


def function_of(value: Any) -> Any:
    """The Python function behind a method or a property; ``None`` for anything else."""
    try:
        function: Any = value.fget if isinstance(value, property) else value
        function = inspect.unwrap(function)
        return function if inspect.isfunction(function) else None
    except Exception:  # an object that raises on being asked, such as the stand-in of a dependency that is not there
        return None


@functools.lru_cache(maxsize=4096)
def parsed(function: Any) -> Method | None:
    """A Python function with its tree; ``None`` where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    return Method(tree, function, tuple(ast.walk(tree))) if isinstance(tree, ast.FunctionDef) else None


def bound_names(method: Method, given: Names | nn.Module, depth: int = 0) -> Names:
    """Names in a function that stand for modules; in loops over containers, for several.

    ``given`` are the arguments, or the module whose method it is.
    """
    own = {method.tree.args.args[0].arg: [given]} if isinstance(given, nn.Module) else given
    names: Names = {name: list(values) for name, values in own.items()}

    def bind(target: ast.expr, values: list[Any]) -> None:
        for part in ast.walk(target):
            if isinstance(part, ast.Name):
                known = names.setdefault(part.id, [])
                known.extend(value for value in values if not any(value is other for other in known))

    inner = {node.name: node for node in method.nodes if isinstance(node, ast.FunctionDef)}
    for node in method.nodes:  # in the order of nesting: good enough
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    for one, value in zip(target.elts, node.value.elts, strict=False):
                        bind(one, meant(value, names, depth))
                elif isinstance(target, (ast.Name, ast.Tuple)):
                    bind(target, meant(node.value, names, depth))
        elif isinstance(node, ast.NamedExpr):
            bind(node.target, meant(node.value, names, depth))
        elif isinstance(node, (ast.For, ast.comprehension)):
            for target, iterated in loop_parts(node.target, node.iter):
                bind(target, members(iterated, names, depth))
        elif isinstance(node, ast.Call):
            callee = inner.get(node.func.id) if isinstance(node.func, ast.Name) else None
            for function in (callee, *(part for part in (node.func, *node.args) if isinstance(part, ast.Lambda))):
                if function is not None:
                    values = [value for part in node.args for value in (*meant(part, names), *members(part, names))]
                    for argument in function.args.args:
                        bind(ast.Name(argument.arg), values)
    return names


def modules_meant(node: ast.expr, names: Names) -> list[nn.Module]:
    """The modules an expression like ``self.blocks[0].conv`` stands for, or may stand for."""
    return [value for value in meant(node, names) if isinstance(value, nn.Module)]


def members(node: ast.expr, names: Names, depth: int = 0) -> list[Any]:
    """What a loop over this expression goes through, in order."""
    return [item for value in meant(node, names, depth) for item in _members(value)]


def loop_parts(target: ast.expr, iterated: ast.expr) -> Iterator[tuple[ast.expr, ast.expr]]:
    """The targets of a loop, each with what it goes through: those of ``enumerate``, ``zip`` and ``items`` apart."""
    if isinstance(target, ast.Tuple) and isinstance(iterated, ast.Call):
        name = iterated.func.id if isinstance(iterated.func, ast.Name) else ""
        if name == "enumerate" and len(target.elts) == 2 and iterated.args:
            yield from loop_parts(target.elts[1], iterated.args[0])
            return
        if name == "zip" and len(target.elts) == len(iterated.args):
            for one, part in zip(target.elts, iterated.args, strict=True):
                yield from loop_parts(one, part)
            return
        if isinstance(iterated.func, ast.Attribute) and iterated.func.attr in _NAMED_MEMBERS and len(target.elts) == 2:
            target = target.elts[1]
    yield target, iterated


def meant(node: ast.expr | None, names: Names, depth: int = 0) -> list[Any]:
    """The modules and lists of modules that an expression may stand for."""
    if isinstance(node, ast.Name):
        return names.get(node.id, [])
    if isinstance(node, ast.Attribute):
        return [value for owner in meant(node.value, names, depth) for value in _attribute(owner, node.attr, depth)]
    if isinstance(node, ast.Subscript):
        return [item for owner in meant(node.value, names, depth) for item in _items(owner, node.slice)]
    if isinstance(node, ast.Call):
        return _returned(node, names, depth)
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        return [[value for part in node.elts for value in meant(part, names, depth)]]
    if isinstance(node, (ast.ListComp, ast.GeneratorExp)):
        return [meant(node.elt, names, depth)]
    if isinstance(node, ast.Dict):
        return [[value for part in node.values for value in meant(part, names, depth)]]
    if isinstance(node, ast.IfExp):
        return [*meant(node.body, names, depth), *meant(node.orelse, names, depth)]
    if isinstance(node, ast.BoolOp):
        return [value for part in node.values for value in meant(part, names, depth)]
    return meant(node.value, names, depth) if isinstance(node, (ast.NamedExpr, ast.Starred)) else []


def _attribute(owner: Any, name: str, depth: int) -> list[Any]:
    if not isinstance(owner, nn.Module):
        return []
    held = owner._modules.get(name, vars(owner).get(name))
    if held is not None:
        return [held] if isinstance(held, (nn.Module, list, tuple, dict)) else []
    value = getattr(type(owner), name, None)
    return _results(function_of(value), owner, depth) if isinstance(value, property) else []


def _results(function: Any, owner: nn.Module, depth: int) -> list[Any]:
    """What a method or property of a module may return."""
    method = parsed(function) if function is not None and depth < _DEEPEST else None
    if method is None or not method.tree.args.args:
        return []
    names = bound_names(method, owner, depth + 1)
    returns = [node.value for node in method.nodes if isinstance(node, ast.Return)]
    return [value for node in returns for value in meant(node, names, depth + 1)]


def _returned(call: ast.Call, names: Names, depth: int) -> list[Any]:
    """What a call may return: ``getattr``, a loop helper, or a method that picks a module."""
    constants = [part.value for part in call.args if isinstance(part, ast.Constant)]
    name = constants[0] if constants and isinstance(constants[0], str) else None
    if isinstance(call.func, ast.Name):
        if call.func.id == "getattr" and call.args:
            owners = meant(call.args[0], names, depth)
            if name is not None:
                return [value for owner in owners for value in _attribute(owner, name, depth)]
            return [child for owner in owners if isinstance(owner, nn.Module) for child in owner.children()]
        if call.func.id == "next" and call.args:
            return members(call.args[0], names, depth)
        if call.func.id in _PASSING_ON:
            return [[item for part in call.args for item in members(part, names, depth)]]
    if isinstance(call.func, ast.Attribute):
        owners = meant(call.func.value, names, depth)
        modules = [owner for owner in owners if isinstance(owner, nn.Module)]
        if call.func.attr == "get_submodule":
            every = [dict(owner.named_modules()) for owner in modules]
            return [held[name] for held in every if name is not None and name in held]
        if call.func.attr in _MEMBERS:
            deep = call.func.attr.endswith("modules")
            return [list(owner.modules() if deep else owner.children()) for owner in modules] + [
                list(owner.values()) for owner in owners if isinstance(owner, dict)
            ]
        return [
            value
            for owner in modules
            if not hasattr(nn.Module, call.func.attr)
            for value in _results(function_of(getattr(type(owner), call.func.attr, None)), owner, depth)
        ]
    return []


def _members(value: Any) -> list[Any]:
    if isinstance(value, _CONTAINERS):
        return list(value.children())
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple)) else []


def _items(owner: Any, where: ast.expr) -> list[Any]:
    """What ``owner[where]`` may be."""
    inside = _members(owner)
    if isinstance(where, ast.Slice):
        return [inside]
    index = ast.literal_eval(where) if isinstance(where, (ast.Constant, ast.UnaryOp)) and _is_literal(where) else None
    if isinstance(index, int) and not isinstance(owner, dict):
        return [inside[index]] if -len(inside) <= index < len(inside) else []
    held: Any = owner._modules if isinstance(owner, nn.ModuleDict) else owner
    return [held[index]] if isinstance(held, dict) and index in held else inside


def _is_literal(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) or (isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant))
