"""Which layers stand right before and right after a batch norm, as far as the source shows it."""

from __future__ import annotations

import ast
import collections
from typing import Any

from torch import nn

from netdeconv.surgery.recognise import is_layer, is_like_batch_norm, is_sequence
from netdeconv.surgery.source import (
    Method,
    Names,
    bound_names,
    forward_functions,
    function_of,
    loop_parts,
    members,
    modules_meant,
    parsed,
)

__all__ = ["Flow"]

_Origins = frozenset[nn.Module]
_NOTHING: _Origins = frozenset()


class Flow:
    """Follows values through sequences and forwards, from layers and batch norms to those that read them.

    Into modules and methods that are called, and out of them. Activations, dropout and pooling between hand on what
    they get; a sum or a concatenation has no single origin.

    Attributes:
        before: for a batch norm the layers whose output it normalises.
        after: for a batch norm the layers that read what it gives.
    """

    def __init__(self, model: nn.Module) -> None:
        self.before: dict[nn.Module, set[nn.Module]] = collections.defaultdict(set)
        self.after: dict[nn.Module, set[nn.Module]] = collections.defaultdict(set)
        self._returned: dict[Any, _Origins] = {}
        for module in model.modules():
            if is_sequence(module):
                self.through(module, _NOTHING)
            elif any(True for _ in module.children()):
                for method in forward_functions(module):
                    self.run(module, method, [])

    def through(self, module: nn.Module, given: _Origins) -> _Origins:
        """What comes out of a module that gets a value of this origin."""
        if is_like_batch_norm(module):
            self.before[module] |= {origin for origin in given if is_layer(origin)}
            return frozenset({module})
        if is_layer(module):
            for origin in given:
                if is_like_batch_norm(origin):
                    self.after[origin].add(module)
            return frozenset({module})
        if is_sequence(module):
            for child in module.children():
                given = self.through(child, given)
            return given
        if any(True for _ in module.children()):
            method = parsed(function_of(type(module).forward))
            return _NOTHING if method is None else self.run(module, method, [given])
        return _NOTHING if "norm" in type(module).__name__.lower() else given

    def run(self, module: nn.Module, method: Method, given: list[_Origins]) -> _Origins:
        """What a method of a module returns, for arguments of these origins."""
        key = (module, method.function, tuple(given))
        if key not in self._returned:
            self._returned[key] = _NOTHING  # for a method that calls itself
            walk = _Walk(self, bound_names(method, module))
            parameters = [argument.arg for argument in method.tree.args.args[1:]]
            walk.statements(method.tree.body, dict(zip(parameters, given, strict=False)))
            self._returned[key] = walk.returned
        return self._returned[key]


class _Walk:
    """One forward, statement by statement: which names hold values of which origin."""

    def __init__(self, flow: Flow, names: Names) -> None:
        self.flow, self.names = flow, names
        self.returned = _NOTHING

    def statements(self, body: list[ast.stmt], held: dict[str, _Origins]) -> dict[str, _Origins]:
        for statement in body:
            held = self._statement(statement, held)
        return held

    def _statement(self, statement: Any, held: dict[str, _Origins]) -> dict[str, _Origins]:
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
            value = self._origins(statement.value, held)
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for target in targets:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        held[name.id] = value if name is target else _NOTHING
        elif isinstance(statement, ast.Return) and statement.value is not None:
            self.returned |= self._origins(statement.value, held)
        elif isinstance(statement, ast.AugAssign):
            self._origins(statement.value, held)
            if isinstance(statement.target, ast.Name):
                held[statement.target.id] = _NOTHING
        elif isinstance(statement, ast.If):
            self._origins(statement.test, held)
            branches = [self.statements(block, dict(held)) for block in (statement.body, statement.orelse)]
            held = {
                name: branches[0].get(name, _NOTHING) | branches[1].get(name, _NOTHING)
                for name in {**branches[0], **branches[1]}
            }
        elif isinstance(statement, (ast.For, ast.AsyncFor)):
            held = self._loop(statement, held)
        else:
            for _, value in ast.iter_fields(statement):
                for part in value if isinstance(value, list) else [value]:
                    if isinstance(part, ast.expr):
                        self._origins(part, held)
                    elif isinstance(part, ast.withitem):
                        self._origins(part.context_expr, held)
                if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                    held = self.statements(value, held)
        return held

    def _loop(self, loop: Any, held: dict[str, _Origins]) -> dict[str, _Origins]:
        """A loop over modules is a sequence of them."""
        self._origins(loop.iter, held)
        turns = [
            (target.id, members(iterated, self.names))
            for target, iterated in loop_parts(loop.target, loop.iter)
            if isinstance(target, ast.Name)
        ]
        before = {name: self.names.get(name, []) for name, _ in turns}
        for turn in range(max((len(children) for _, children in turns), default=0) or 1):
            for name, children in turns:
                held[name] = _NOTHING
                self.names[name] = children[turn : turn + 1] or before[name]
            held = self.statements(loop.body, held)
        self.names.update(before)
        return self.statements(loop.orelse, held)

    def _origins(self, node: ast.expr, held: dict[str, _Origins]) -> _Origins:
        """Where the value of an expression comes from; calls of modules on the way are noted."""
        if isinstance(node, ast.Name):
            return held.get(node.id, _NOTHING)
        if isinstance(node, ast.Call):
            return self._call(node, held)
        parts = [self._origins(part, held) for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)]
        if isinstance(node, ast.NamedExpr):
            held[node.target.id] = parts[-1]
            return parts[-1]
        if isinstance(node, ast.IfExp):
            return parts[1] | parts[2]
        if isinstance(node, ast.BinOp):
            by_number = isinstance(node.right, ast.Constant)
            return parts[0] if by_number else _NOTHING
        return parts[0] if isinstance(node, (ast.Attribute, ast.Subscript)) else _NOTHING

    def _call(self, node: ast.Call, held: dict[str, _Origins]) -> _Origins:
        arguments = [self._origins(part, held) for part in (*node.args, *(word.value for word in node.keywords))]
        called = modules_meant(node.func, self.names)
        if not called:  # checkpoint(self.conv, x)
            called = [module for part in node.args for module in modules_meant(part, self.names)]
            given = _NOTHING.union(*arguments)
        else:
            given = arguments[0] if arguments else _NOTHING
        if called:
            return _NOTHING.union(*(self.flow.through(module, given) for module in called))
        if isinstance(node.func, ast.Attribute) and not hasattr(nn.Module, node.func.attr):
            for module in modules_meant(node.func.value, self.names):
                method = parsed(function_of(getattr(type(module), node.func.attr, None)))
                if method is not None and method.tree.args.args:
                    return self.flow.run(module, method, arguments)
        owner = self._origins(node.func, held)  # x.relu(), or F.relu(x)
        return owner or (arguments[0] if arguments else _NOTHING)
