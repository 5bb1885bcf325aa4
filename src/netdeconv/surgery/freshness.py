"""Which batch norms read a tensor that nobody else reads: the new output of the layer right before them.

Only there may the normalisation go without a trace. Elsewhere an operation in place after it would reach its
input, which a shortcut may still need. Proof is looked for in the source of the forward; without it, the answer
is no.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from torch import nn

from netdeconv.surgery.recognise import is_layer, is_like_batch_norm
from netdeconv.surgery.source import Names, bound_names, forward_functions, modules_meant

__all__ = ["sole_readers"]


def sole_readers(model: nn.Module) -> set[nn.Module]:
    """Batch norms for which every call in the source is one of

    - ``bn(conv(x))``;
    - ``x = conv(x)`` and in the next statement, maybe inside ``if``, ``x = ...bn(x)...`` with no other x;
    - ``y = conv(x)`` and later ``bn(y)``, with no other y in the whole function and no loop around;
    - the place after a layer in an ``nn.Sequential``.
    """
    proofs: dict[nn.Module, list[bool]] = {}
    for module in model.modules():
        if not any(is_like_batch_norm(child) for child in module.modules() if child is not module):
            continue
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            before: nn.Module | None = None
            for child in module:
                if is_like_batch_norm(child):
                    proofs.setdefault(child, []).append(_gives_new(before))
                before = child
            continue
        for function in forward_functions(module):
            names = bound_names(function, module)
            single = _names_of_one_reader(function, names)
            for norm, proven in _calls(function.body, None, names, single):
                proofs.setdefault(norm, []).append(proven)
    return {norm for norm, found in proofs.items() if all(found)}


def _calls(
    body: list[ast.stmt], before: ast.stmt | None, names: Names, single: set[str]
) -> Iterator[tuple[nn.Module, bool]]:
    """Every call of a batch norm in some statements, and whether it is proven to be the sole reader."""
    for statement in body:
        blocks = [value for _, value in ast.iter_fields(statement) if _is_block(value)]
        for part in _own_expressions(statement):
            for node in ast.walk(part):
                if isinstance(node, ast.Call):
                    for norm in modules_meant(node.func, names):
                        if is_like_batch_norm(norm):
                            yield norm, _proven(node, statement, before, names, single)
        for block in blocks:
            # A branch follows the statement before it; that its condition may look at the value does no harm.
            yield from _calls(block, before if isinstance(statement, ast.If) else None, names, single)
        before = statement


def _proven(call: ast.Call, statement: ast.stmt, before: ast.stmt | None, names: Names, single: set[str]) -> bool:
    if len(call.args) != 1 or call.keywords:
        return False
    argument = call.args[0]
    if isinstance(argument, ast.Call):
        return _is_new(argument, names)
    if isinstance(argument, ast.Name) and argument.id in single:
        return True
    if not (isinstance(argument, ast.Name) and isinstance(statement, ast.Assign) and isinstance(before, ast.Assign)):
        return False
    name = argument.id
    loads = [node for node in ast.walk(statement) if isinstance(node, ast.Name) and node.id == name]
    return (
        _targets(before) == _targets(statement) == [name]
        and len(loads) == 2  # once read, once written
        and isinstance(before.value, ast.Call)
        and _is_new(before.value, names)
    )


def _names_of_one_reader(function: ast.FunctionDef, names: Names) -> set[str]:
    """Names that are given a layer's output once, and read once, not in a loop."""
    repeated = (ast.For, ast.While, ast.AsyncFor, ast.Lambda, ast.FunctionDef, ast.comprehension, ast.Try)
    if any(isinstance(node, repeated) for statement in function.body for node in ast.walk(statement)):
        return set()
    reads: list[str] = []
    writes: list[str] = []
    given = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            (reads if isinstance(node.ctx, ast.Load) else writes).append(node.id)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and _is_new(node.value, names):
            given |= set(_targets(node)) if len(node.targets) == 1 else set()
    return {name for name in given if reads.count(name) == 1 and writes.count(name) == 1}


def _is_new(call: ast.Call, names: Names) -> bool:
    layers = modules_meant(call.func, names)
    return bool(layers) and all(_gives_new(layer) for layer in layers)


def _gives_new(module: nn.Module | None) -> bool:
    """Whether a module's output is a new tensor that no hook has seen."""
    return module is not None and is_layer(module) and not (module._forward_hooks or module._backward_hooks)


def _targets(statement: ast.Assign) -> list[str]:
    return [target.id if isinstance(target, ast.Name) else "" for target in statement.targets]


def _is_block(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, ast.stmt) for item in value)


def _own_expressions(statement: ast.stmt) -> list[ast.AST]:
    """The parts of a statement that are not statements themselves."""
    parts: list[ast.AST] = []
    for _, value in ast.iter_fields(statement):
        if isinstance(value, ast.AST):
            parts.append(value)
        elif isinstance(value, list) and not _is_block(value):
            parts += [item for item in value if isinstance(item, ast.AST)]
    return parts
