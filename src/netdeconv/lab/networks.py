"""Small networks for experiments that two cores can train."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from netdeconv import ConfigError, WhitenedConv2d, WhitenedLinear, WhiteningConfig

__all__ = ["NORMS", "SmallConvNet"]

NORMS = ("bn", "nd")


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
