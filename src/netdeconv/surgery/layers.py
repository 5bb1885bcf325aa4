"""What takes a module's place, and putting it there: whitened and plain twins, a scale and shift for a batch norm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from netdeconv.config import WhiteningConfig
from netdeconv.errors import ConfigError, ShapeError
from netdeconv.functional.precision import exact
from netdeconv.nn import WhitenedConv1d, WhitenedConv2d, WhitenedConv3d, WhitenedLinear
from netdeconv.nn.layer import WhitenedLayer

__all__ = [
    "ChannelAffine",
    "Setting",
    "become",
    "copied",
    "parameter_like",
    "plain_again",
    "plain_twin",
    "scale_and_shift",
    "setting_for",
    "whitened_twin",
]

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


def whitened_twin(layer: Any, whitening: WhiteningConfig | None, path: str, with_bias: bool = False) -> nn.Module:
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


def plain_again(layer: Any) -> nn.Module:
    """The plain layer with this whitened one's very parameters."""
    new = _plain_like(layer)
    new.weight, new.bias = layer.weight, layer.bias
    return new


def plain_twin(layer: WhitenedLayer) -> nn.Module:
    """The plain layer that equals a whitened one in evaluation mode.

    Raises:
        ConfigError: a subclass with a forward of its own.
    """
    whitened = next((kind for kind in (*(pair[1] for pair in _CONVS), WhitenedLinear) if isinstance(layer, kind)), None)
    changed = whitened is None or type(layer).forward is not whitened.forward or "forward" in vars(layer)
    if changed:
        raise ConfigError(
            f"{layer.whitening.label}: expected one of netdeconv's whitened layers, got {type(layer).__name__} with a "
            "forward of its own, which a plain layer would not have."
        )
    weight, bias = layer.folded()
    new = _plain_like(layer)
    old_bias = layer.weight if layer.bias is None else layer.bias
    new.weight = parameter_like(layer.weight, weight)
    new.bias = nn.Parameter(bias.detach().clone(), requires_grad=old_bias.requires_grad)
    return new


def _plain_like(layer: Any) -> Any:
    """A plain layer of this one's shape, without values."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, layer.out_features, device="meta")
    kind: Any = next(plain for plain, _ in _CONVS if isinstance(layer, plain))
    return kind(*_shape_of(layer), padding_mode=layer.padding_mode, device="meta")


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


class ChannelAffine(nn.Module):
    """``y = weight * x + bias`` per channel: the same in training and evaluation, no statistics.

    Shapes: ``(N, C, *)`` -> the same; weight and bias ``(C,)``, both parameters.

    Raises:
        ShapeError: x does not have C channels.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        channels = self.weight.numel()
        if x.dim() < 2 or x.shape[1] != channels:
            raise ShapeError(f"ChannelAffine: expected x of shape (N, {channels}, *), got {tuple(x.shape)}.")
        shape = (1, -1, *[1] * (x.dim() - 2))
        return x * self.weight.reshape(shape).to(x.dtype) + self.bias.reshape(shape).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}"


def scale_and_shift(norm: Any) -> tuple[Tensor, Tensor] | None:
    """Scale and shift in float64 that a batch norm applies in evaluation; ``None`` without remembered statistics.

    ``scale = weight / sqrt(running_var + eps)``, ``shift = bias - scale * running_mean``.
    """
    if norm.running_mean is None or norm.running_var is None:
        return None
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    scale = torch.rsqrt(exact(norm.running_var.detach()) + getattr(norm, "eps", 0.0))
    if weight is not None:
        scale = scale * exact(weight.detach())
    shift = -scale * exact(norm.running_mean.detach())
    return scale, shift if bias is None else shift + exact(bias.detach())


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
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
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
