"""Which batch norms read a tensor that nobody else reads: the new output of the layer right before them.

Only there may the normalisation go without a trace. Elsewhere an operation in place after it would reach its
input, which a shortcut may still need. Proof is looked for in the source of the forward; without it, the answer
is no.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from torch import nn

from netdeconv.surgery.recognise import LAYERS, is_like_batch_norm, is_sequence
from netdeconv.surgery.source import Names, bound_names, forward_functions, modules_meant

__all__ = ["sole_readers"]

# These may give the very numbers that they get, at the same place; dropout in evaluation.
_HANDING_ON = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)


def sole_readers(model: nn.Module) -> set[nn.Module]:
    """Batch norms, without hooks, for which every call in the source is one of

    - ``bn(conv(x))``;
    - ``x = conv(x)`` and in the next statement, maybe inside ``if``, ``x = ...bn(x)...`` with no other x;
    - ``y = conv(x)`` and later ``bn(y)``, with no other y in the whole function and no loop around;
    - the place after a layer in an ``nn.Sequential`` that is only called as a whole, or where what follows is seen
      not to work in place.
    """
    proofs: dict[nn.Module, list[bool]] = {}
    whole = _called_as_a_whole(model)
    for module in model.modules():
        if not any(is_like_batch_norm(child) for child in module.modules() if child is not module):
            continue
        if is_sequence(module):
            parts: list[Any] = [None, *module.children()]
            for index, child in enumerate(parts):
                if index and is_like_batch_norm(child):
                    safe = module in whole or _stays([*child.children(), *parts[index + 1 :]], module is model)
                    proofs.setdefault(child, []).append(safe and _gives_new(parts[index - 1]))
            continue
        for method in forward_functions(module):
            names = bound_names(method, module)
            single = _names_of_one_reader(method.tree, names)
            for norm, proven in _calls(method.tree.body, None, names, single):
                proofs.setdefault(norm, []).append(proven)
    return {norm for norm, found in proofs.items() if all(found) and not (norm._forward_pre_hooks or _hooked(norm))}


def _called_as_a_whole(model: nn.Module) -> set[nn.Module]:
    """Sequences that the source calls, and nowhere mentions otherwise: nobody runs their members one by one.

    The model itself is not among them: users may.
    """
    called: set[nn.Module] = set()
    taken: set[nn.Module] = set()
    for module in model.modules():
        if is_sequence(module) or not any(is_sequence(part) for part in module.modules()):
            continue
        for method in forward_functions(module):
            names = bound_names(method, module)
            harmless = set(_asking(method.tree))
            for node in method.nodes:
                if isinstance(node, ast.Call):
                    called |= set(modules_meant(node.func, names))
                    harmless.add(node.func)
            taken |= {
                part
                for node in method.nodes
                if isinstance(node, (ast.Name, ast.Attribute, ast.Subscript)) and node not in harmless
                and not isinstance(node.ctx, ast.Store)
                for part in modules_meant(node, names)
                if is_sequence(part)
            }  # fmt: skip
    whole = called - taken
    for module in model.modules():  # parents come first
        if is_sequence(module) and (module in whole or module is model):
            whole |= {child for child in module.children() if child not in taken}
    return whole


def _stays(following: list[nn.Module], at_the_end: bool) -> bool:
    """Whether a value is seen not to be changed in place by the modules it goes through next."""
    for module in following:
        if isinstance(module, _HANDING_ON) and not getattr(module, "inplace", False):
            continue
        known = type(module).__module__.startswith("torch.nn.") and not any(True for _ in module.children())
        return (known and not getattr(module, "inplace", False)) or isinstance(module, LAYERS)
    return at_the_end


def _asking(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """Expressions of which only is asked whether there is a module."""
    for node in ast.walk(function):
        if isinstance(node, (ast.If, ast.IfExp)):
            yield node.test
        elif isinstance(node, ast.UnaryOp):
            yield node.operand
        elif isinstance(node, ast.BoolOp):
            yield from node.values
        elif isinstance(node, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
            yield node.left
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "len"):
            yield from node.args


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
    """Whether a module's output is a new tensor that no hook has seen: torch's own forward makes one, and ours."""
    if module is None or "forward" in vars(module) or _hooked(module):
        return False
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in LAYERS)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._backward_hooks)


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
