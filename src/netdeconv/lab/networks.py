"""Networks by name: of the zoo, torchvision and timm, and two small ones for experiments that two cores can train."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from typing import Any

from torch import nn

from netdeconv import ConfigError, WhitenedConv2d, WhitenedLinear, WhiteningConfig, zoo
from netdeconv.lab.names import nearest
from netdeconv.lab.vit import SmallViT

__all__ = ["NORMS", "TASKS", "SmallConvNet", "check_name", "network", "network_names"]

NORMS = ("bn", "nd")  # of the small network
_SMALL = ("small", "vit")  # made for the images they get
TASKS = ("classification", "segmentation")

_TORCHVISION, _TIMM = "torchvision:", "timm:"


def network(
    name: str,
    width: float = 1.0,
    classes: int = 10,
    *,
    task: str = "classification",
    in_channels: int | None = None,
    image_size: int | None = None,
) -> nn.Module:
    """A network with batch normalisation and new random weights.

    Nothing is downloaded: networks of torchvision and timm start from random weights in every part.

    Args:
        name: ``"small"``, ``"vit"``, a network of the zoo, ``"torchvision:NAME"`` or ``"timm:NAME"``.
        width: factor on the channels; not for networks of torchvision or timm.
        classes: outputs.
        task: one of :data:`TASKS`. Networks for segmentation are those of torchvision, with an auxiliary head where
            they can have one.
        in_channels: channels of the images; ``None`` for the network's own number, 3.
        image_size: height and width of the images; asked for by ``"small"`` and ``"vit"`` only.

    Raises:
        ConfigError: no such network, or a setting that cannot apply.
    """
    name = name.lower()
    if name.startswith(_TIMM):
        return _of_timm(name, width, classes, task, in_channels or 3)
    known = network_names(task)
    if name not in known:
        listing = [one for one in known if not one.startswith(_TORCHVISION)] or known
        own = "a network of the zoo, torchvision:NAME or timm:NAME"
        where = own if task == "classification" else "torchvision:NAME"
        raise ConfigError(
            f"expected a network for {task}, {where}, got {name!r}. {nearest(name, known, listing=listing)}"
        )
    if not 0 < width < float("inf"):
        raise ConfigError(f"expected a width above 0, got {width:g}")
    if name == "small":
        shape = {"in_channels": in_channels, "image_size": image_size, "width": max(1, round(16 * width))}
        given: dict[str, Any] = {name: value for name, value in shape.items() if value is not None}
        return SmallConvNet("bn", num_classes=classes, **given)
    if name == "vit":
        shape = {"in_channels": in_channels, "image_size": image_size, "width": max(2, 2 * round(24 * width))}
        return SmallViT(num_classes=classes, **{name: value for name, value in shape.items() if value is not None})
    try:
        if name.startswith(_TORCHVISION):
            model = _of_torchvision(name.removeprefix(_TORCHVISION), width, classes, task)
        else:
            model = zoo.create(name, num_classes=classes, width=width)
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from None
    if in_channels not in (None, 3):
        _set_input_channels(model, name, in_channels)
    return model


def network_names(task: str = "classification") -> list[str]:
    """Names that :func:`network` takes for a task, but for those of timm; torchvision's where it is installed."""
    own = [*_SMALL, *zoo.NETWORKS] if task == "classification" else []
    try:
        from torchvision import models
    except ModuleNotFoundError:
        return own
    module = models if task == "classification" else models.segmentation
    return own + [f"{_TORCHVISION}{name}" for name in models.list_models(module=module)]


def check_name(name: str) -> None:
    """Refuse a network that there is not, without loading torchvision for one of the zoo.

    Raises:
        ConfigError: it has no network of this name for any task.
    """
    own = [*_SMALL, *zoo.NETWORKS]
    if name.lower() in own:
        return
    if name.lower().startswith(_TIMM):
        _check_timm(name.lower())
        return
    known = list(dict.fromkeys(one for task in TASKS for one in network_names(task)))
    if name.lower() not in known:
        listing = [*own, "torchvision:NAME", "timm:NAME"]
        raise ConfigError(f"--network: there is no {name}. {nearest(name, known, listing=listing)}")


def _of_torchvision(name: str, width: float, classes: int, task: str) -> nn.Module:
    if width != 1:
        raise ConfigError(
            f"width={width:g} cannot apply to {_TORCHVISION}{name}. Leave it out, or take a network of the zoo"
        )
    from torchvision.models import get_model

    segmentation: dict[str, Any] = {"weights_backbone": None} if task == "segmentation" else {}
    if segmentation and not name.startswith("lraspp"):
        segmentation["aux_loss"] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about the random weights of old networks
        model: nn.Module = get_model(name, weights=None, num_classes=classes, **segmentation)
    return model


def _check_timm(name: str) -> None:
    try:
        import timm
    except ModuleNotFoundError:
        raise ConfigError(f"{name} needs timm, which is not installed. Run: pip install timm") from None
    own, known = name.removeprefix(_TIMM), timm.list_models()
    if own not in known:
        raise ConfigError(f"timm has no network {own!r}. {nearest(own, known, listing=['timm.list_models()'])}")


def _of_timm(name: str, width: float, classes: int, task: str, channels: int) -> nn.Module:
    if width != 1 or task != "classification":
        given = f"width={width:g}" if width != 1 else f"the task {task}"
        raise ConfigError(f"{given} cannot apply to {name}. Leave it out, or take a network of the zoo")
    _check_timm(name)
    from timm import create_model

    model: nn.Module = create_model(name.removeprefix(_TIMM), pretrained=False, num_classes=classes, in_chans=channels)
    return model


def _set_input_channels(model: nn.Module, name: str, channels: int | None) -> None:
    """Let the first convolution take images of so many channels, with new random weights."""
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels == 3 and layer.groups == 1:
            new = nn.Conv2d(
                channels or 3,
                layer.out_channels,
                layer.kernel_size,  # type: ignore[arg-type]
                layer.stride,  # type: ignore[arg-type]
                layer.padding,  # type: ignore[arg-type]
                layer.dilation,  # type: ignore[arg-type]
                bias=layer.bias is not None,
                padding_mode=layer.padding_mode,
            )
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, new)
            return
    raise ConfigError(f"{name}: expected a convolution of 3 channels, to be given {channels}; found none")


class SmallConvNet(nn.Sequential):
    """Three 3x3 convolutions and a linear layer, for images of about 8x8 pixels.

    The sizes of the layers are the same for both norms. ``"bn"``: convolution without bias, batch
    normalisation, ReLU; a plain linear layer at the end. ``"nd"``: whitened convolution with bias, ReLU; a
    whitened linear layer at the end; no batch normalisation anywhere.

    Args:
        norm: ``"bn"`` or ``"nd"``.
        in_channels: channels of the images.
        num_classes: outputs.
        width: channels of the first convolution; the others have twice as many.
        image_size: height and width of the images, a multiple of 4.
        whitening: settings of every whitened layer; the library's defaults when ``None``.

    Shape:
        ``(N, in_channels, image_size, image_size)`` to ``(N, num_classes)``.
    """

    def __init__(
        self,
        norm: str,
        *,
        in_channels: int = 1,
        num_classes: int = 10,
        width: int = 16,
        image_size: int = 8,
        whitening: WhiteningConfig | None = None,
    ) -> None:
        if norm not in NORMS:
            raise ConfigError(f"SmallConvNet: expected norm 'bn' or 'nd', got {norm!r}.")
        if norm == "bn" and whitening is not None:
            raise ConfigError("SmallConvNet: whitening cannot apply to norm='bn'. Pass norm='nd', or leave it out.")
        if image_size < 4 or image_size % 4:
            raise ConfigError(f"SmallConvNet: expected image_size a multiple of 4, got {image_size}.")
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        channels = in_channels
        for i, (out, pool) in enumerate(((width, False), (2 * width, True), (2 * width, True)), start=1):
            if norm == "bn":
                layers[f"conv{i}"] = nn.Conv2d(channels, out, 3, padding=1, bias=False)
                layers[f"norm{i}"] = nn.BatchNorm2d(out)
            else:
                layers[f"conv{i}"] = WhitenedConv2d(channels, out, 3, padding=1, whitening=whitening)
            layers[f"relu{i}"] = nn.ReLU(inplace=True)
            if pool:
                layers[f"pool{i}"] = nn.MaxPool2d(2)
            channels = out
        layers["flatten"] = nn.Flatten()
        features = channels * (image_size // 4) ** 2
        if norm == "bn":
            layers["head"] = nn.Linear(features, num_classes)
        else:
            layers["head"] = WhitenedLinear(features, num_classes, whitening=whitening)
        super().__init__(layers)
