"""Turning one module into another where it stands, so that every reference to it sees the change."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["become"]

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
    extra = {name: value for name, value in vars(old).items() if name not in vars(new)}
    hooks = {name: vars(old)[name] for name in _HOOKS if name in vars(old)}
    state: dict[str, Any] = {**extra, **vars(new), **hooks}
    old.__class__ = type(new)
    vars(old).clear()
    vars(old).update(state)
