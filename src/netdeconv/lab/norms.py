"""The normalisation of a network, switched by name."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from netdeconv import ConfigError, WhiteningConfig, convert, zoo
from netdeconv.lab.names import nearest

__all__ = ["NORMS", "with_norm"]

Value = TypeVar("Value")

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_GROUPS = 32  # of Wu and He, Group Normalization, ECCV 2018
_LINEAR_BLOCK_OF_IMAGENET = 64  # of the paper's command line there; for 32x32 images 512

# Newton-Schulz steps of the first layer in the authors' networks, by the beginning of the name; elsewhere 5.
_FIRST_LAYER = {
    "vgg": 15, "senet": 15, "torchvision:": 15,
    "preact_resnet": 10, "resnext": 10, "mobilenet": 10, "dpn": 10, "pnasnet": 10, "efficientnet": 10,
}  # fmt: skip
# The same of layers inside blocks: depthwise and narrowing convolutions, and grouped ones.
_INSIDE = {"mobilenet": {"conv2": 1, "conv3": 1}, "resnext": {"conv2": 3}}

NORMS = {
    "bn": "batch normalisation, the network as it is",
    "nd": "network deconvolution with this library's defaults",
    "nd-paper": "network deconvolution, the published procedure to the letter",
    "nd-authors": "the same, with the exceptions of the authors' networks",
    "gn": "group normalisation, 32 groups",
    "ln": "layer normalisation over channels and positions",
    "in": "instance normalisation with scale and shift",
    "none": "no normalisation",
}


def with_norm(
    model: nn.Module, norm: str, whitening: Mapping[str, Any] | None = None, *, name: str | None = None
) -> nn.Module:
    """A copy of a network with batch normalisation, with another normalisation in its place.

    Args:
        model: has batch norms.
        norm: one of :data:`NORMS`.
        whitening: settings of :class:`netdeconv.WhiteningConfig` that differ from the norm's own; only for norms
            that are network deconvolution.
        name: of the network. The published procedure has smaller blocks for linear layers in networks of
            torchvision. ``"nd-authors"`` leaves the batch norms of :data:`netdeconv.zoo.PUBLISHED_EXCLUDE`, and takes
            the authors' number of Newton-Schulz steps in the first layer and inside MobileNetV2 and ResNeXt; it does
            not freeze the first layer at times, nor change the block size inside MobileNetV2, as their code does.

    Raises:
        ConfigError: unknown norm or setting, or a setting that cannot apply.
    """
    if norm not in NORMS:
        raise ConfigError(f"--norm: there is no {norm}. {nearest(norm, NORMS)}")
    whitening = dict(whitening or {})
    _check_settings(norm, whitening)
    if norm == "nd":
        return convert(model, WhiteningConfig(**whitening))
    if norm in ("nd-paper", "nd-authors"):
        return _published(model, whitening, name or "", exceptions=norm == "nd-authors")
    return copy.deepcopy(model) if norm == "bn" else _replaced(model, _REPLACEMENTS[norm])


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
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, _BATCH_NORMS):
                setattr(module, name, replacement(child.num_features))
    return model


def _group_norm(channels: int) -> nn.Module:
    """With as many groups as the channels and 32 have for a common divisor."""
    return nn.GroupNorm(math.gcd(channels, _GROUPS), channels)


_REPLACEMENTS: dict[str, Callable[[int], nn.Module]] = {
    "gn": _group_norm,
    "ln": lambda channels: nn.GroupNorm(1, channels),
    "in": lambda channels: nn.GroupNorm(channels, channels),
    "none": lambda channels: nn.Identity(),
}
