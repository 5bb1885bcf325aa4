"""What the module tree shows without running anything: neighbours of batch norms, poolings, readers of weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from netdeconv.surgery.layers import holds_modules, is_layer, is_whitened
from netdeconv.surgery.norms import is_like_batch_norm

__all__ = ["Neighbours", "Structure", "is_pointwise"]

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
        self._stays: dict[nn.Module, bool] = {}
        self.several: dict[nn.Module, list[nn.Module]] = {}
        self._before: dict[nn.Module, frozenset[nn.Module]] = {}
        self._after: dict[nn.Module, frozenset[nn.Module]] = {}
        self._unsure: set[nn.Module] = set()
        self._parents: dict[nn.Module, tuple[str, nn.Module]] = {}
        order: list[nn.Module] = []
        followers: dict[nn.Module, list[nn.Module]] = {}
        inner: set[nn.Module] = set()
        for module in model.modules():  # parents come first
            children = dict(module.named_children())
            kind = type(module)
            if is_like_batch_norm(module) or _makes(module):
                order.append(module)
            if is_sequence(module) or kind.__name__ in _SEQUENCES:
                _through(module, False, self.pooled)
            if is_sequence(module) and module not in inner:
                chain = list(_flat(module, inner))
                self._chain(chain, is_sequence(model))
                _follow(chain, followers)
            self.pooled |= {
                children[name] for name in _SQUEEZED.get(kind.__name__, ()) if is_pointwise(children.get(name))
            }
            for name in _READ.get(f"{kind.__module__}.{kind.__name__}", ()):
                if name in children:
                    self.read[children[name]] = f"{kind.__name__} reads its weight itself"
            for name, child in children.items():
                self._parents.setdefault(child, (name, module))
            if not is_sequence(module):
                _follow(list(children.values()), followers)
        self.several = {layer: norms for layer, norms in followers.items() if len(norms) > 1}
        self.neighbours = self._all_neighbours(order)
        self.fresh = {norm for norm, stays in self._stays.items() if stays}

    def _chain(self, chain: list[nn.Module], at_the_end: bool) -> None:
        """Note what stands around the batch norms of a sequence."""
        for index, norm in enumerate(chain):
            if not is_like_batch_norm(norm):
                continue
            before, after = _nearest(reversed(chain[:index])), _nearest(chain[index + 1 :])
            if before is None or self._before.get(norm, before) != before:
                self._unsure.add(norm)
            self._before[norm] = before or frozenset()
            self._after[norm] = self._after.get(norm, frozenset()) | (after or frozenset())
            stays = _stays([*norm.children(), *chain[index + 1 :]], at_the_end)
            self._stays[norm] = stays and self._stays.get(norm, True)

    def _all_neighbours(self, order: list[nn.Module]) -> dict[nn.Module, Neighbours]:
        found = {}
        for index, norm in enumerate(order):
            if not is_like_batch_norm(norm):
                continue
            if norm in self._before and norm not in self._unsure:
                found[norm] = Neighbours(self._before[norm], self._after[norm], True)
                continue
            before = self._feeding(norm, order[:index])
            rest = order[index + 1 :]
            reading = next((module for module in rest if not is_like_batch_norm(module)), None)
            after = frozenset({reading}) if reading is not None and _takes(reading, norm) else frozenset()
            beside = (*order[index - 1 : index], *rest[:1])
            found[norm] = Neighbours(before, after | self._after.get(norm, frozenset()), False)
            found[norm] = found[norm]._replace(**self._ambiguity(norm, beside, before))
        return found

    def _feeding(self, norm: nn.Module, earlier: list[nn.Module]) -> frozenset[nn.Module]:
        """The layer right before a batch norm, or those of the same parent whose outputs join to its width."""
        parts: list[nn.Module] = []
        inside = set(self._parents.get(norm, ("", norm))[1].modules())
        width = 0
        for layer in reversed(earlier):
            given = _given(layer)
            outside = layer not in inside
            if is_like_batch_norm(layer) or (outside and (parts or layer in self.pooled)) or (parts and given is None):
                break
            parts.append(layer)
            if given is None or width + given >= _width(norm):
                return frozenset(parts) if given is None or width + given == _width(norm) else frozenset()
            width += given
        return frozenset()

    def _ambiguity(self, norm: nn.Module, beside: Iterable[nn.Module], before: frozenset[nn.Module]) -> dict[str, Any]:
        """What else could feed a batch norm, among the modules that its parent holds."""
        _, parent = self._parents.get(norm, ("", norm))
        namesake = self._namesake(norm)
        if namesake is not None:
            return {"before": frozenset({namesake}), "rivals": frozenset()}
        norms = [other for other in beside if is_like_batch_norm(other) and _width(other) == _width(norm)]
        if any(self._parents.get(other, ("", None))[1] is parent for other in norms):
            return {"rivals": None}
        others = parent.children() if before else parent.modules()  # what stands behind it tells less
        rivals = frozenset(other for other in others if _makes(other) and _gives(other, norm))
        return {"rivals": rivals - before - self.pooled}

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


def is_sequence(module: nn.Module) -> bool:
    """Whether calling this calls its members in order, each with what the one before gives."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _flat(sequence: nn.Module, inner: set[nn.Module]) -> Iterable[nn.Module]:
    for child in sequence.children():
        if is_sequence(child):
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
    if is_sequence(module) or type(module).__name__ in _SEQUENCES:
        for child in module:  # a member may stand there twice
            pooled = _through(child, pooled, found)
        return pooled and is_sequence(module)
    harmless = is_like_batch_norm(module) or isinstance(module, nn.Identity) or type(module).__module__ in _BETWEEN
    return pooled and harmless


def is_pointwise(module: Any) -> bool:
    """Whether it is a convolution of one tap."""
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and set(module.kernel_size) == {1}
