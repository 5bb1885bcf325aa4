"""What the module tree shows without running anything: neighbours of batch norms, poolings, readers of weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from netdeconv.surgery.layers import holds_modules, is_layer, is_whitened
from netdeconv.surgery.norms import is_like_batch_norm

__all__ = ["Structure", "is_pointwise"]

_POOLINGS: tuple[Any, ...] = (
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
# What these classes, of whatever library, give the means of all channels to.
_SQUEEZED = {
    "SqueezeExcitation": ("fc1", "fc2"),  # torchvision's, and the zoo's
    "SqueezeExcite": ("conv_reduce", "conv_expand"),  # timm's
    "SEModule": ("fc1", "fc2"),  # timm's
    "EffectiveSEModule": ("fc",),  # timm's
}
# Layers of these classes whose weight their forward reads itself.
_READ = {
    "torch.nn.modules.activation.MultiheadAttention": ("out_proj",),
    "torch.nn.modules.transformer.TransformerEncoderLayer": ("linear1", "linear2"),  # in its fast path
    "torchvision.models.swin_transformer.ShiftedWindowAttention": ("qkv", "proj"),
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": ("qkv", "proj"),
    "timm.models.swin_transformer_v2.WindowAttention": ("qkv",),
    "timm.models.beit.Attention": ("qkv",),
    "timm.models.eva.EvaAttention": ("qkv",),
}
# Sequences that run their members in order, and afterwards do something else.
_SEQUENCES = ("ASPPPooling",)  # torchvision's DeepLab
# Of torch, what takes every number, or every pixel, by itself.
_BETWEEN = ("torch.nn.modules.activation", "torch.nn.modules.dropout", "torch.nn.modules.normalization")
# These may give the very numbers that they get, at the same place; dropout in evaluation.
_HANDING_ON = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
# By what names a batch norm is called, where its layer is called "conv...".
_NORM_NAMES = ("batchnorm", "batch_norm", "bn", "norm")


class Neighbours(NamedTuple):
    """The layers next to a batch norm.

    Attributes:
        before, after: the layers that feed it, and that read it, or may.
        sure: a sequence shows what feeds it; else it is the order of the modules that suggests it.
        rivals: further layers of the same parent that could feed it as well; ``None`` where nothing tells which does.
    """

    before: frozenset[nn.Module]
    after: frozenset[nn.Module]
    sure: bool
    rivals: frozenset[nn.Module] | None = frozenset()


class _Place(NamedTuple):
    """Where a batch norm stands in a sequence: layers around it, and whether nothing behind is seen to write to it."""

    before: frozenset[nn.Module] | None
    after: frozenset[nn.Module] | None
    stays: bool


class Structure:
    """One look at a module tree.

    Attributes:
        neighbours: of every batch norm.
        pooled: 1x1 convolutions whose maps are seen to be of one pixel: in sequences, and in squeeze and excitation.
            What the tree does not show, the layers notice themselves (:meth:`netdeconv.nn.Whitening.sees_few_rows`).
        read: for layers whose weight is known to be read elsewhere, by whom.
        several: layers that stand in several places, before another batch norm in each, with these.
        fresh: batch norms of which a sequence shows that nothing behind writes to what they give.
    """

    def __init__(self, model: nn.Module) -> None:
        self.pooled: set[nn.Module] = set()
        self.read: dict[nn.Module, str] = {}
        self._places: dict[nn.Module, list[_Place]] = {}
        self._parents: dict[nn.Module, tuple[str, nn.Module]] = {}
        order: list[nn.Module] = []
        followers: dict[nn.Module, list[nn.Module]] = {}
        inner: set[nn.Module] = set()
        for module in model.modules():  # parents come first
            children, kind = dict(module.named_children()), type(module)
            if is_like_batch_norm(module) or _makes(module):
                order.append(module)
            if _is_sequence(module) or kind.__name__ in _SEQUENCES:
                _through(module, False, self.pooled)
            if not _is_sequence(module):
                _follow(list(children.values()), followers)
            elif module not in inner:
                chain = list(_flat(module, inner))
                self._chain(chain, _is_sequence(model))
                _follow(chain, followers)
            squeezed = (children.get(name) for name in _SQUEEZED.get(kind.__name__, ()))
            self.pooled |= {layer for layer in squeezed if layer is not None and is_pointwise(layer)}
            for name in _READ.get(f"{kind.__module__}.{kind.__name__}", ()):
                if name in children:
                    self.read[children[name]] = f"{kind.__name__} reads its weight itself"
            for name, child in children.items():
                self._parents.setdefault(child, (name, module))
        self.several = {layer: norms for layer, norms in followers.items() if len(norms) > 1}
        self.neighbours = {
            norm: self._around(norm, order[:index], order[index + 1 :])
            for index, norm in enumerate(order)
            if is_like_batch_norm(norm)
        }
        self.fresh = {norm for norm, places in self._places.items() if all(place.stays for place in places)}

    def _chain(self, chain: list[nn.Module], at_the_end: bool) -> None:
        """Note what stands around the batch norms of a sequence."""
        for index, norm in enumerate(chain):
            if is_like_batch_norm(norm):
                rest = chain[index + 1 :]
                stays = _stays([*norm.children(), *rest], at_the_end)
                place = _Place(_nearest(reversed(chain[:index])), _nearest(rest), stays)
                self._places.setdefault(norm, []).append(place)

    def _around(self, norm: nn.Module, earlier: list[nn.Module], later: list[nn.Module]) -> Neighbours:
        """What stands around a batch norm, by the sequences that it is in, or by the order of the modules."""
        places = self._places.get(norm, [])
        after: frozenset[nn.Module] = frozenset().union(*(place.after or () for place in places))
        shown = {place.before for place in places}
        if len(shown) == 1 and None not in shown:
            return Neighbours(shown.pop() or frozenset(), after, True)
        reading = next((module for module in later if not is_like_batch_norm(module)), None)
        if reading is not None and _takes(reading, norm):
            after |= {reading}
        namesake = self._namesake(norm)
        if namesake is not None:
            return Neighbours(frozenset({namesake}), after, False)
        before, parent = self._feeding(norm, earlier), self._parent(norm)
        beside = (other for other in (*earlier[-1:], *later[:1]) if is_like_batch_norm(other))
        if any(_width(other) == _width(norm) and self._parent(other) is parent for other in beside):
            return Neighbours(before, after, False, None)
        others = parent.children() if before else parent.modules()  # what stands behind it tells less
        rivals = frozenset(other for other in others if _makes(other) and _gives(other, norm))
        return Neighbours(before, after, False, rivals - before - self.pooled)

    def _parent(self, module: nn.Module) -> nn.Module:
        return self._parents.get(module, ("", module))[1]

    def _feeding(self, norm: nn.Module, earlier: list[nn.Module]) -> frozenset[nn.Module]:
        """The layer right before a batch norm, or those of the same parent whose outputs join to its width."""
        parts: list[nn.Module] = []
        inside, width = set(self._parent(norm).modules()), 0
        for layer in reversed(earlier):
            given, outside = _given(layer), layer not in inside
            if is_like_batch_norm(layer) or (outside and (parts or layer in self.pooled)) or (parts and given is None):
                break
            parts.append(layer)
            if given is None or width + given >= _width(norm):
                return frozenset(parts) if given is None or width + given == _width(norm) else frozenset()
            width += given
        return frozenset()

    def _namesake(self, norm: nn.Module) -> nn.Module | None:
        """``conv2`` of ``bn2``, and ``convs.2`` of ``bns.2``."""
        name, parent = self._parents.get(norm, ("", norm))
        above, grandparent = self._parents.get(parent, ("", parent))
        for word in _NORM_NAMES:
            layer: Any = None
            if word in name:
                layer = parent._modules.get(name.replace(word, "conv"))
            elif word in above and isinstance(parent, nn.ModuleList):
                held = grandparent._modules.get(above.replace(word, "conv"))
                layer = None if held is None else held._modules.get(name)
            if layer is not None and is_layer(layer) and _gives(layer, norm) and name[-1:].isdigit():
                return layer
        return None


def _is_sequence(module: nn.Module) -> bool:
    """Whether calling this calls its members in order, each with what the one before gives."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _flat(sequence: nn.Module, inner: set[nn.Module]) -> Iterable[nn.Module]:
    for child in sequence.children():
        if _is_sequence(child):
            inner.add(child)
            yield from _flat(child, inner)
        else:
            yield child


def _nearest(steps: Iterable[nn.Module]) -> frozenset[nn.Module] | None:
    """The first layer on a way through other modules; ``None`` where there may be another, inside of one of them."""
    for step in steps:
        if is_like_batch_norm(step):
            continue
        if _makes(step):
            return frozenset({step})
        if holds_modules(step):
            return None
    return None


def _follow(children: list[nn.Module], followers: dict[nn.Module, list[nn.Module]]) -> None:
    """Note for the layers among these which batch norm comes right behind them."""
    for layer, norm in itertools.pairwise(children):
        if is_layer(layer) and is_like_batch_norm(norm) and norm not in followers.setdefault(layer, []):
            followers[layer].append(norm)


def _makes(module: nn.Module) -> bool:
    """Whether this is a layer, of torch or of anybody: it has a matrix of weights, which is more than scales."""
    if is_layer(module):
        return True
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    if not own or holds_modules(module):
        return False
    return any(is_lazy(parameter) or sum(size > 1 for size in parameter.shape) > 1 for parameter in own)


def _width(norm: Any) -> int:
    mean = norm.running_mean
    return int(norm.num_features if mean is None or is_lazy(mean) else mean.numel())


def _gives(layer: Any, norm: nn.Module) -> bool:
    """Whether a layer gives as many channels as a batch norm takes, as far as is known."""
    return not is_like_batch_norm(layer) and _given(layer) in (None, _width(norm))


def _given(layer: Any) -> int | None:
    given = getattr(layer, "out_channels", getattr(layer, "out_features", None))
    return given if isinstance(given, int) else None


def _takes(layer: Any, norm: nn.Module) -> bool:
    """Whether a layer takes as many channels as a batch norm gives; a linear layer also those of a flattened map."""
    if not is_layer(layer):
        return False
    if isinstance(layer, nn.Linear):
        return layer.in_features % _width(norm) == 0
    return bool(layer.in_channels == _width(norm))


def _stays(following: list[nn.Module], at_the_end: bool) -> bool:
    """Whether a value is seen not to be changed in place by the modules it goes through next."""
    for module in following:
        if isinstance(module, _HANDING_ON):
            continue
        known = type(module).__module__.startswith("torch.nn.") and not holds_modules(module)
        return known or is_layer(module) or is_whitened(module)
    return at_the_end


def _through(module: Any, pooled: bool, found: set[nn.Module]) -> bool:
    """Whether a module puts out a map of one pixel, if it gets one or not; notes convolutions that get one."""
    if isinstance(module, _POOLINGS):
        size = module.output_size
        return pooled or (set(size) if isinstance(size, (tuple, list)) else {size}) == {1}
    if is_pointwise(module):
        if pooled:
            found.add(module)
        return pooled
    if _is_sequence(module) or type(module).__name__ in _SEQUENCES:
        for child in module:  # a member may stand there twice
            pooled = _through(child, pooled, found)
        return pooled and _is_sequence(module)
    harmless = is_like_batch_norm(module) or isinstance(module, nn.Identity) or type(module).__module__ in _BETWEEN
    return pooled and harmless


def is_pointwise(module: Any) -> bool:
    """Whether it is a convolution of one tap."""
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and set(module.kernel_size) == {1}
