"""Convolutions and linear layers: telling them, their whitened and plain twins, and putting one in another's place."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from netdeconv.config import WhiteningConfig
from netdeconv.errors import ConfigError
from netdeconv.nn import ChannelWhitening, WhitenedConv1d, WhitenedConv2d, WhitenedConv3d, WhitenedLinear, Whitening
from netdeconv.nn.layer import WhitenedLayer

__all__ = [
    "Setting",
    "become",
    "copied",
    "holds_modules",
    "is_layer",
    "is_quantised",
    "is_whitened",
    "parameter_like",
    "plain_again",
    "plain_twin",
    "setting_for",
    "whitened_twin",
    "why_not_whiten",
]

Model = TypeVar("Model", bound=nn.Module)
Setting: TypeAlias = "WhiteningConfig | Callable[[str, nn.Module], WhiteningConfig | None] | None"

_TWINS: dict[Any, Any] = {
    nn.Conv1d: WhitenedConv1d, nn.Conv2d: WhitenedConv2d, nn.Conv3d: WhitenedConv3d, nn.Linear: WhitenedLinear
}  # fmt: skip
_PLAIN = tuple(_TWINS)
# What a subclass may define and still be the same layer to everybody who calls it.
_BUILDING = {"__init__", "__repr__", "extra_repr", "reset_parameters", "__constants__"}


def is_whitened(module: nn.Module) -> bool:
    """Whether it whitens already, or is what does so in a layer."""
    return isinstance(module, (WhitenedLayer, ChannelWhitening, Whitening))


def is_layer(module: nn.Module) -> bool:
    """Whether this is some kind of convolution or linear layer."""
    if isinstance(module, (*_PLAIN, _ConvTransposeNd)):
        return True
    name = type(module).__name__.lower()
    named = is_quantised(module) and ("conv" in name or name.endswith("linear"))
    return named and not any(is_layer(child) for child in module.children())


def why_not_whiten(module: Any) -> str | None:
    """The reason this layer cannot be replaced by a whitened one; ``None`` when it can."""
    kind = type(module)
    if isinstance(module, WhitenedLayer):
        return "whitened already"
    if is_quantised(module):
        return "quantised: convert the floating point network and quantise that"
    if isinstance(module, _ConvTransposeNd):
        # Its output at a position is made of the taps that reach it, others at the border and at every offset of the
        # stride, and so would be what the mean folds to: no plain transposed convolution with a bias equals it.
        return "transposed convolution: the mean of its input does not fold into a bias"
    if hasattr(module, "parametrizations"):
        return "its weight is parametrised (torch.nn.utils.parametrize), which whitening weights would not respect"
    if isinstance(module, LazyModuleMixin) or is_lazy(module.weight):
        return "lazy: run one batch through the model first, so that the shapes are known"
    if "weight" not in module._parameters:
        return "its weight is computed (weight_norm, spectral_norm, pruning, ...), not a parameter"
    changed = _changed_members(module, _PLAIN)
    if changed:
        return f"{kind.__module__}.{kind.__name__} is not torch's own layer (it defines {changed}); see rules="
    if not module.weight.is_floating_point():
        return f"weights of type {module.weight.dtype} are not real numbers"
    if isinstance(module, nn.Linear) and 0 in (module.in_features, module.out_features):
        return "no features"
    return None


def _changed_members(module: nn.Module, known: tuple[type, ...]) -> str:
    """Names of methods that the module's classes define beyond torch's; and of a forward set on the object."""
    names = {"forward"} & set(vars(module))
    for base in type(module).__mro__:
        if base in known:
            break
        names |= {
            name
            for name, value in vars(base).items()
            if name not in _BUILDING and (inspect.isfunction(value) or isinstance(value, property))
        }
    return ", ".join(sorted(names))


def holds_modules(module: nn.Module) -> bool:
    """Whether there are modules inside."""
    return any(True for _ in module.children())


def is_quantised(module: nn.Module) -> bool:
    """Whether this is a class of torch's quantisation, or made for it."""
    place = type(module).__module__
    return any(part in place for part in (".quantized", "ao.nn.qat", "nn.intrinsic", "quantizable"))


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
    if bias is None and with_bias:
        zeros = torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
        bias = nn.Parameter(zeros, requires_grad=weight.requires_grad)
    kind = next(whitened for plain, whitened in _TWINS.items() if isinstance(layer, plain))
    new = _like(layer, kind, bias=bias is not None, whitening=whitening, dtype=weight.dtype)
    new.whitening.to_empty(device=weight.device)
    new.whitening.reset_statistics()
    new.weight, new.bias = weight, bias
    new.whitening.label = f"{path}: {new.whitening.label}" if path else new.whitening.label
    return new


def plain_again(layer: Any) -> nn.Module:
    """torch's own layer of this one's shape, with its very parameters."""
    new = _plain_like(layer)
    new.weight, new.bias = layer.weight, layer.bias
    return new


def plain_twin(layer: Any) -> nn.Module:
    """The plain layer that equals a whitened one in evaluation mode.

    Raises:
        ConfigError: a subclass with a forward of its own.
    """
    whitened = next((kind for kind in _TWINS.values() if isinstance(layer, kind)), None)
    if whitened is None or type(layer).forward is not whitened.forward or "forward" in vars(layer):
        raise ConfigError(
            f"{layer.whitening.label}: expected one of netdeconv's whitened layers, got {type(layer).__name__} with a "
            "forward of its own, which a plain layer would not have."
        )
    weight, bias = layer.folded()
    learns = (layer.weight if layer.bias is None else layer.bias).requires_grad
    new = _plain_like(layer)
    new.weight = parameter_like(layer.weight, weight)
    new.bias = nn.Parameter(bias.detach().clone(), requires_grad=learns)
    return new


def parameter_like(old: Tensor, value: Tensor) -> nn.Parameter:
    """A parameter of this value in the old one's dtype, memory format and ``requires_grad``."""
    new = torch.empty_like(old, requires_grad=False)
    new.copy_(value.detach())
    return nn.Parameter(new, requires_grad=old.requires_grad)


def _plain_like(layer: Any) -> Any:
    return _like(layer, next(plain for plain in _TWINS if isinstance(layer, plain)))


def _like(layer: Any, kind: Any, **options: Any) -> Any:
    """A layer of another class with this one's shape, without values."""
    if isinstance(layer, nn.Linear):
        return kind(layer.in_features, layer.out_features, device="meta", **options)
    shape = [  # torch takes one number in a tuple for all dimensions
        value * len(layer.kernel_size) if isinstance(value, tuple) and len(value) == 1 else value
        for value in (layer.stride, layer.padding, layer.dilation)
    ]
    sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, *shape, layer.groups)
    return kind(*sizes, padding_mode=layer.padding_mode, device="meta", **options)


def become(old: nn.Module, new: nn.Module) -> None:
    """Make ``old`` what ``new`` is: class, parameters, buffers and children; in place.

    As torch's lazy modules do when they learn their shapes. Tied modules stay tied, and lists or closures that
    hold the module need no search. Hooks, training flag and attributes that ``new`` does not have stay
    ``old``'s. ``new`` must not be used afterwards.
    """
    new.train(old.training)
    taken = {*vars(new), *new._parameters, *new._buffers, *new._modules}  # an attribute would hide these
    extra = {name: value for name, value in vars(old).items() if name not in taken}
    hooks = {name: value for name, value in vars(old).items() if "hook" in name and name in vars(new)}
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
