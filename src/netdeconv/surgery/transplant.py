"""Copying a model, and turning modules into others where they stand, so that every reference sees the change."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from netdeconv.errors import ConfigError

__all__ = ["become", "copied"]

Model = TypeVar("Model", bound=nn.Module)

# What a module has attached to itself, beside its parameters: kept when it becomes another.
_HOOKS = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def become(old: nn.Module, new: nn.Module) -> None:
    """Make ``old`` what ``new`` is: class, parameters, buffers and children; in place.

    As torch's lazy modules do when they learn their shapes. Tied modules stay tied, and lists or closures that
    hold the module need no search. Hooks, training flag and attributes that ``new`` does not have stay
    ``old``'s. ``new`` must not be used afterwards.
    """
    new.train(old.training)
    taken = {*vars(new), *new._parameters, *new._buffers, *new._modules}  # an attribute would hide these
    extra = {name: value for name, value in vars(old).items() if name not in taken}
    hooks = {name: vars(old)[name] for name in _HOOKS if name in vars(old)}
    state: dict[str, Any] = {**extra, **vars(new), **hooks}
    old.__class__ = type(new)
    vars(old).clear()
    vars(old).update(state)


def copied(model: Model, who: str) -> Model:
    """A deep copy of a model, for the function ``who``.

    Tensors that the last forward computed and a module kept, which ``copy.deepcopy`` refuses, are copied without their
    graph: weights under pruning or the old ``weight_norm``, which a hook computes anew on every call, or features.

    Raises:
        ConfigError: it cannot be copied.
    """
    computed = [
        value
        for module in model.modules()
        for value in tree_leaves(vars(module))
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    try:
        return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{who}: expected a model that copy.deepcopy can copy, got {type(model).__name__}, which it cannot "
            f"({error}). Look for an attribute that is open (a file, a generator, a lock) or that was "
            "computed; if there are lazy modules, run a batch through the model first."
        ) from error
