"""The normalisation of a network, switched by name."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from torch import nn

from netdeconv import ConfigError, WhiteningConfig, convert, zoo
from netdeconv.lab.names import nearest
from netdeconv.lab.rivals import (
    SWBN,
    DecorrelatedConv2d,
    DecorrelatedLinear,
    IterNorm,
    StandardisedConv2d,
)

__all__ = ["NORMS", "Norm", "with_norm"]

Value = TypeVar("Value")

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_REPLACING = ("gn", "ln", "in", "iternorm", "swbn", "gn+ws", "none")  # norms that do nothing where there are none
_GROUPS = 32  # of Wu and He, Group Normalization, ECCV 2018
_CHANNELS = 4  # of a group at least: with one it would be instance normalisation
# Layers that stay plain under network deconvolution and DBP. After 60 steps of the transformer on CIFAR-10 the training
# loss is 1.78 so and 2.01 with them whitened (1.88 with the patches alone, 1.93 with the head alone; plain 1.93).
_PLAIN = {"vit": ("patches", "head")}
# Of the matrices that are learned a little at every step: the best of 1e-5 to 1e-2 after 120 steps of VGG-11 at an
# eighth of its width on CIFAR-10. The papers' lengths, down to 1e-5, are for many epochs, and do little in a few.
_DBP_STEP, _SWBN_STEP = 3e-3, 1e-2
_LINEAR_BLOCK_OF_IMAGENET = 64  # of the paper's command line there; for 32x32 images 512

# Newton-Schulz steps of the first layer in the authors' networks, by the beginning of the name; elsewhere 5.
_FIRST_LAYER = {
    "vgg": 15, "senet": 15, "torchvision:": 15,
    "preact_resnet": 10, "resnext": 10, "mobilenet": 10, "dpn": 10, "pnasnet": 10, "efficientnet": 10,
}  # fmt: skip
# The same of layers inside blocks: depthwise and narrowing convolutions, and grouped ones.
_INSIDE = {"mobilenet": {"conv2": 1, "conv3": 1}, "resnext": {"conv2": 3}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norm:
    """A normalisation by name.

    Args:
        text: a line of ``--help``.
        label: in tables and pictures.
        title: in full, where the label is short.
        line: colour, marker and, if not solid, dashes of its line in pictures.
        make: from a network with batch norms, settings of whitening and the network's name to a new network.
    """

    text: str
    label: str
    title: str = ""
    line: tuple[str, ...]
    make: Callable[[nn.Module, dict[str, Any], str], nn.Module]

    @property
    def style(self) -> dict[str, Any]:
        """What matplotlib's ``plot`` takes."""
        return dict(zip(("color", "marker", "linestyle"), self.line, strict=False))

    def __str__(self) -> str:
        return self.title or self.label


def with_norm(
    model: nn.Module, norm: str, whitening: Mapping[str, Any] | None = None, *, name: str | None = None
) -> nn.Module:
    """A copy of a network with batch normalisation, with another normalisation in its place.

    Args:
        model: has batch norms.
        norm: one of :data:`NORMS`.
        whitening: settings of :class:`netdeconv.WhiteningConfig` that differ from the norm's own; only for norms
            that are network deconvolution.
        name: of the network, in any case. Of ``"vit"`` patches and head stay plain under ``"nd"`` and ``"dbp"``. The
            published procedure has smaller blocks for linear layers in networks of torchvision. ``"nd-authors"`` leaves
            the batch norms of :data:`netdeconv.zoo.PUBLISHED_EXCLUDE`, and takes the authors' number of Newton-Schulz
            steps in the first layer and inside MobileNetV2 and ResNeXt; it does not freeze the first layer at times,
            nor change the block size inside MobileNetV2, as their code does.

    Raises:
        ConfigError: unknown norm or setting, a setting that cannot apply, or no batch norm for a norm that takes its
            place.
    """
    if norm not in NORMS:
        raise ConfigError(f"--norm: there is no {norm}. {nearest(norm, NORMS)}")
    whitening = dict(whitening or {})
    _check_settings(norm, whitening)
    normalised = [module for module in model.modules() if "Norm" in type(module).__name__]
    # Without any norms, a network is one with none.
    replaces = norm in _REPLACING and (norm != "none" or normalised)
    if replaces and not any(isinstance(module, _BATCH_NORMS) for module in normalised):
        raise ConfigError(
            f"--norm {norm}: expected a network with batch norms, whose place it takes, got {name or 'one'} without. "
            "Leave it out, or use bn, which changes nothing here, nd or dbp"
        )
    return NORMS[norm].make(model, whitening, (name or "").lower())


def _check_settings(norm: str, whitening: Mapping[str, Any]) -> None:
    if whitening and not norm.startswith("nd"):
        raise ConfigError(f"--whitening.{next(iter(whitening))} cannot apply to --norm {norm}. Use --norm nd")
    known = [field.name for field in dataclasses.fields(WhiteningConfig)]
    for name in whitening:
        if name not in known:
            raise ConfigError(f"--whitening.{name}: there is no such setting. {nearest(name, known)}")


def _published(model: nn.Module, whitening: dict[str, Any], name: str, *, exceptions: bool) -> nn.Module:
    first = next((path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)), None)
    steps = _of_network(_FIRST_LAYER, name)
    inside = _of_network(_INSIDE, name) or {}

    def setting(path: str, layer: nn.Module) -> WhiteningConfig:
        own: dict[str, Any] = {}
        if isinstance(layer, nn.Linear) and name.startswith("torchvision:"):
            own["block_size"] = _LINEAR_BLOCK_OF_IMAGENET
        if exceptions and path == first and steps is not None:
            own["num_iters"] = steps
        elif exceptions and (within := path.rpartition(".")[2]) in inside:
            own["num_iters"] = inside[within]
        return WhiteningConfig.paper(**{**own, **whitening})

    return convert(model, setting, exclude=zoo.PUBLISHED_EXCLUDE.get(name) if exceptions else None)


def _of_network(table: Mapping[str, Value], name: str) -> Value | None:
    """The entry of the network, found by the beginning of its name."""
    return next((value for start, value in table.items() if name.startswith(start)), None)


def _replaced(model: nn.Module, replacement: Callable[[int], nn.Module]) -> nn.Module:
    def swap(child: nn.Module) -> nn.Module | None:
        if not isinstance(child, _BATCH_NORMS):
            return None
        new = replacement(child.num_features).train(child.training)
        like = child.running_mean if child.weight is None else child.weight
        return new if like is None else new.to(like)

    return _swapped(model, swap)


def _swapped(model: nn.Module, swap: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """A copy with other modules where ``swap`` gives one."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            new = swap(child)
            if new is not None:
                setattr(module, name, new)
    return model


def _group_norm(channels: int) -> nn.Module:
    """With as many groups as 32 and 4 channels in each allow; one group where there are too few channels."""
    allowed = (n for n in range(min(_GROUPS, channels // _CHANNELS), 0, -1) if channels % n == 0)
    return nn.GroupNorm(next(allowed, 1), channels)


def _like(layer: nn.Module, kinds: Mapping[type, Callable[..., nn.Module]]) -> nn.Module | None:
    """A layer of another kind with the same geometry, bias and weights; ``None`` where the kind is to stay."""
    if type(layer) not in kinds:
        return None
    conv = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    names = conv if isinstance(layer, nn.Conv2d) else ("in_features", "out_features")
    shape = {name: getattr(layer, name) for name in names}
    weight: Any = layer.weight
    new = kinds[type(layer)](**shape, bias=layer.bias is not None, device=weight.device, dtype=weight.dtype)
    new.load_state_dict(layer.state_dict(), strict=False)  # what the new kind adds starts anew
    return new.train(layer.training)


def _decorrelated(model: nn.Module, whitening: dict[str, Any], name: str) -> nn.Module:
    """Every convolution and linear layer decorrelates what it sees; batch norms stay, as the paper has them."""
    kinds: dict[type, Callable[..., nn.Module]] = {
        nn.Conv2d: partial(DecorrelatedConv2d, step=_DBP_STEP),
        nn.Linear: partial(DecorrelatedLinear, step=_DBP_STEP),
    }
    new = _swapped(model, lambda child: _like(child, kinds))
    for path in _PLAIN.get(name, ()):
        setattr(new, path, copy.deepcopy(model.get_submodule(path)))
    return new


def _standardised(model: nn.Module, whitening: dict[str, Any], name: str) -> nn.Module:
    return _swapped(_replaced(model, _group_norm), lambda child: _like(child, {nn.Conv2d: StandardisedConv2d}))


def _each(replacement: Callable[[int], nn.Module]) -> Callable[[nn.Module, dict[str, Any], str], nn.Module]:
    """Another layer in the place of every batch norm, made from its number of channels."""
    return lambda model, whitening, name: _replaced(model, replacement)


# Okabe and Ito's colours, and a few more, stay apart for colour-blind readers; marker and dash tell them apart in grey.
NORMS = {
    "bn": Norm(
        text="batch normalisation, the network as it is",
        label="BatchNorm",
        line=("#0072B2", "o"),
        make=lambda model, whitening, name: copy.deepcopy(model),
    ),
    "nd": Norm(
        text="network deconvolution with this library's defaults",
        label="ND",
        title="network deconvolution",
        line=("#D55E00", "s"),
        make=lambda model, whitening, name: convert(model, WhiteningConfig(**whitening), exclude=_PLAIN.get(name)),
    ),
    "nd-paper": Norm(
        text="network deconvolution, the published procedure to the letter",
        label="ND, published procedure",
        line=("#CC79A7", "v", ":"),
        make=partial(_published, exceptions=False),
    ),
    "nd-authors": Norm(
        text="the same, with the exceptions of the authors' networks",
        label="ND, authors' networks",
        line=("#7F7F7F", "x", ":"),
        make=partial(_published, exceptions=True),
    ),
    "gn": Norm(
        text="group normalisation, at most 32 groups, of at least 4 channels",
        label="GroupNorm",
        line=("#009E73", "D", "--"),
        make=_each(_group_norm),
    ),
    "ln": Norm(
        text="layer normalisation over channels and positions",
        label="LayerNorm",
        line=("#E69F00", "P", "--"),
        make=_each(lambda channels: nn.GroupNorm(1, channels)),
    ),
    "in": Norm(
        text="instance normalisation with scale and shift",
        label="InstanceNorm",
        line=("#8C510A", "<", "--"),
        make=_each(lambda channels: nn.GroupNorm(channels, channels)),
    ),
    "iternorm": Norm(
        text="iterative normalisation: groups of 64 channels whitened behind the convolution",
        label="IterNorm",
        line=("#56B4E9", "^", "--"),
        make=_each(IterNorm),
    ),
    "dbp": Norm(
        text="decorrelated backpropagation: a learned matrix in front of every layer; batch norms stay",
        label="BatchNorm + DBP",
        line=("#6A3D9A", ">", "-."),
        make=_decorrelated,
    ),
    "swbn": Norm(
        text="stochastic whitening batch normalisation: channels whitened by a learned matrix",
        label="SWBN",
        line=("#808000", "X", "-."),
        make=_each(partial(SWBN, step=_SWBN_STEP)),
    ),
    "gn+ws": Norm(
        text="group normalisation as gn, and convolutions with standardised weights",
        label="GroupNorm + WS",
        line=("#01665E", "d", "-."),
        make=_standardised,
    ),
    "none": Norm(
        text="no normalisation",
        label="no normalisation",
        line=("#000000", "*"),
        make=_each(lambda channels: nn.Identity()),
    ),
}
