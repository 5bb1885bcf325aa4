"""Folders of image files, one folder for each class, and files in them that cannot be read."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from netdeconv import ConfigError

__all__ = ["UNREADABLE", "class_folders", "name_broken", "opened", "read_class_folders"]

# What Pillow raises for a file that is no image, broken off, damaged, or absurdly large.
UNREADABLE: tuple[type[Exception], ...] = (OSError, SyntaxError, ValueError, struct.error)
_NAMED = 3


def class_folders(folder: Path, *, hint: str) -> Any:
    """The image files below ``folder/CLASS/`` as torchvision's ``ImageFolder``, not opened yet.

    Args:
        folder: holds one folder for each class; their sorted names are the labels' order.
        hint: the expected layout and where it comes from, for the error.

    Raises:
        ConfigError: there is no such folder, or a class without images.
    """
    from torchvision.datasets import ImageFolder

    if not folder.is_dir():
        raise ConfigError(f"expected {folder}, which is not there. {hint}")
    try:
        return ImageFolder(str(folder))
    except FileNotFoundError as error:
        reason = str(error).split(". ")[0]
        raise ConfigError(f"expected images in {folder}: {reason[0].lower()}{reason[1:]}. {hint}") from None


def opened(path: str) -> Any:
    """An image file, decoded, as RGB.

    Raises:
        Exception: one of ``UNREADABLE``.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None


def name_broken(broken: Sequence[str], *, strict: bool) -> None:
    """Say in one warning which files were left out.

    Args:
        broken: a path and what is wrong with it, each.
        strict: an error instead.

    Raises:
        ConfigError: with ``strict``, if there are any.
    """
    if not broken:
        return
    some = "; ".join(broken[:_NAMED]) + (f"; and {len(broken) - _NAMED} more" if len(broken) > _NAMED else "")
    if strict:
        raise ConfigError(f"expected images that can be read, got {some}. Without strict, such files are left out")
    files = "one image file" if len(broken) == 1 else f"{len(broken)} image files"
    warnings.warn(f"{files} left out that cannot be read: {some}", UserWarning, stacklevel=2)


def read_class_folders(folder: Path, *, size: int, strict: bool, hint: str) -> tuple[Tensor, Tensor, int]:
    """All images below ``folder/CLASS/``, in memory.

    Args:
        folder: holds one folder for each class.
        size: side of the images; others are left out like broken ones.
        strict: stop at a file that cannot be read.
        hint: the expected layout, for the error.

    Returns:
        8-bit images ``(N, 3, size, size)``, labels ``(N,)``, and the number of classes.

    Raises:
        ConfigError: nothing there, or nothing that can be read.
    """
    listed = class_folders(folder, hint=hint)
    images, labels, broken = [], [], []
    for path, label in listed.samples:
        try:
            image = opened(path)
            if image.size != (size, size):
                raise ValueError(f"{image.width}x{image.height} pixels where {size}x{size} are expected")
        except UNREADABLE as error:
            broken.append(f"{path} ({error})")
        else:
            images.append(np.asarray(image))
            labels.append(label)
    name_broken(broken, strict=strict or not images)
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return stacked, torch.tensor(labels), len(listed.classes)
