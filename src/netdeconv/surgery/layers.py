"""A layer's twin: the whitened one of a plain layer, and the plain one of a whitened layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from netdeconv.config import WhiteningConfig
from netdeconv.errors import ConfigError
from netdeconv.nn import WhitenedConv1d, WhitenedConv2d, WhitenedConv3d, WhitenedLinear
from netdeconv.nn.layer import WhitenedLayer

__all__ = ["Setting", "parameter_like", "plain_twin", "setting_for", "whitened_twin"]

Setting: TypeAlias = "WhiteningConfig | Callable[[str, nn.Module], WhiteningConfig | None] | None"

_CONVS: tuple[tuple[type, Any], ...] = (
    (nn.Conv1d, WhitenedConv1d),
    (nn.Conv2d, WhitenedConv2d),
    (nn.Conv3d, WhitenedConv3d),
)


def setting_for(setting: Setting, path: str, layer: nn.Module) -> WhiteningConfig | None:
    """The settings of one layer: what a function says, otherwise those given.

    Raises:
        ConfigError: something else than settings was given.
    """
    found = setting(path, layer) if callable(setting) else setting
    if found is not None and not isinstance(found, WhiteningConfig):
        raise ConfigError(
            f"convert: expected whitening a WhiteningConfig, a function of (path, layer) that returns one, or None, "
            f"got {found!r} for {path or 'the model'}."
        )
    return found


def whitened_twin(layer: Any, whitening: WhiteningConfig | None, path: str, with_bias: bool) -> nn.Module:
    """The whitened layer with this layer's parameters, and a bias of zero where it has none and wants one."""
    weight, bias = layer.weight, layer.bias
    place: dict[str, Any] = {"device": "meta", "dtype": weight.dtype}
    arguments: dict[str, Any] = {"bias": bias is not None or with_bias, "whitening": whitening}
    new: Any
    if isinstance(layer, nn.Linear):
        new = WhitenedLinear(layer.in_features, layer.out_features, **arguments, **place)
    else:
        kind = next(whitened for plain, whitened in _CONVS if isinstance(layer, plain))
        new = kind(*_shape_of(layer), padding_mode=layer.padding_mode, **arguments, **place)
    new.whitening.to_empty(device=weight.device)
    new.whitening.reset_statistics()
    new.weight = weight
    if bias is not None:
        new.bias = bias
    elif with_bias:
        new.bias = nn.Parameter(
            torch.zeros(new.bias.shape, dtype=weight.dtype, device=weight.device), requires_grad=weight.requires_grad
        )
    new.whitening.label = f"{path}: {new.whitening.label}" if path else new.whitening.label
    return new


def plain_twin(layer: WhitenedLayer) -> nn.Module:
    """The plain layer that equals a whitened one in evaluation mode.

    Raises:
        ConfigError: a subclass with a forward of its own.
    """
    any_layer: Any = layer
    whitened = next((kind for kind in (*(pair[1] for pair in _CONVS), WhitenedLinear) if isinstance(layer, kind)), None)
    changed = whitened is None or type(layer).forward is not whitened.forward or "forward" in vars(layer)
    if changed:
        raise ConfigError(
            f"{layer.whitening.label}: expected one of netdeconv's whitened layers, got {type(layer).__name__} with a "
            "forward of its own, which a plain layer would not have."
        )
    weight, bias = layer.folded()
    new: Any
    if isinstance(layer, nn.Linear):
        new = nn.Linear(layer.in_features, layer.out_features, device="meta")
    else:
        kind = next(plain for plain, _ in _CONVS if isinstance(layer, plain))
        new = kind(*_shape_of(any_layer), padding_mode=any_layer.padding_mode, device="meta")
    old_bias = layer.weight if layer.bias is None else layer.bias
    new.weight = parameter_like(layer.weight, weight)
    new.bias = nn.Parameter(bias.detach().clone(), requires_grad=old_bias.requires_grad)
    return new


def parameter_like(old: Tensor, value: Tensor) -> nn.Parameter:
    """A parameter of this value in the old one's dtype, memory format and ``requires_grad``."""
    new = torch.empty_like(old, requires_grad=False)
    new.copy_(value.detach())
    return nn.Parameter(new, requires_grad=old.requires_grad)


def _shape_of(conv: Any) -> tuple[Any, ...]:
    def full(value: Any) -> Any:  # torch takes one number in a tuple for all dimensions
        return value * len(conv.kernel_size) if isinstance(value, tuple) and len(value) == 1 else value

    return (
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        full(conv.stride),
        full(conv.padding),
        full(conv.dilation),
        conv.groups,
    )
