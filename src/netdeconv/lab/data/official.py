"""MNIST, Fashion-MNIST and the CIFARs as torchvision reads and downloads them, whole and in memory."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from netdeconv import ConfigError

__all__ = ["fetch", "folder", "read"]

_FOLDERS = {
    "MNIST": "MNIST/raw",
    "FashionMNIST": "FashionMNIST/raw",
    "CIFAR10": "cifar-10-batches-py",
    "CIFAR100": "cifar-100-python",
}

# What reading raises for files with something else in them, besides OSError and RuntimeError.
_DAMAGED = (ValueError, AssertionError, EOFError, LookupError, AttributeError, pickle.UnpicklingError)


def folder(name: str, root: Path) -> Path:
    """Where a data set's files are, in torchvision's layout."""
    return root / _FOLDERS[name]


def fetch(name: str, root: Path) -> None:
    """Download a data set where it is not there yet.

    Raises:
        ConfigError: no connection, or no room.
    """
    if not _missing(name, root):
        return
    try:
        _kind(name)(str(root), download=True)
    except (OSError, RuntimeError, *_DAMAGED) as error:
        raise ConfigError(
            f"{name} could not be downloaded to {root} ({_reason(error)}). Where there is a connection, run  "
            f"{_command(name, 'FOLDER')}  and copy FOLDER/{_FOLDERS[name].split('/')[0]} to {root}"
        ) from None


def read(name: str, root: Path, *, train: bool, classes: int, instead: str = "") -> tuple[Tensor, Tensor]:
    """One part of a data set.

    Args:
        name: torchvision's name of it.
        root: folder of the data sets.
        train: which part.
        classes: number of classes.
        instead: what else could have been in ``root``, for the error.

    Returns:
        8-bit images ``(N, C, H, W)`` and labels ``(N,)``.

    Raises:
        ConfigError: it is not there, or cannot be read.
    """
    place = folder(name, root)
    if missing := _missing(name, root):
        where = f"{place} or {instead}, and found neither" if instead else f"{place}, which has no {missing[0]}"
        raise ConfigError(
            f"expected {name} in {where}. Get it with the option download, or with  {_command(name, root)}"
        )
    try:
        found = _kind(name)(str(root), train=train)
        images, labels = torch.as_tensor(found.data), torch.as_tensor(found.targets)
        if len(images) != len(labels) or not len(images):
            raise ValueError(f"{len(images)} images with {len(labels)} labels")
        if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(f"labels from {labels.min()} to {labels.max()} for {classes} classes")
    except (OSError, RuntimeError, *_DAMAGED) as error:
        raise ConfigError(
            f"expected {name} in {place}, whose files cannot be read ({_reason(error)}). Delete that folder and get it "
            f"again with  {_command(name, root)}"
        ) from None
    return images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous(), labels.long()


def _command(name: str, root: Path | str) -> str:
    return f"""python -c "from torchvision.datasets import {name}; {name}('{root}', download=True)\""""


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _missing(name: str, root: Path) -> list[str]:
    """Files of the data set that are not there."""
    kind = _kind(name)
    if hasattr(kind, "train_list"):
        files = [file for file, _ in kind.train_list + kind.test_list] + [kind.meta["filename"]]
    else:
        files = [Path(url).stem for url, _ in kind.resources]
    return [file for file in files if not (folder(name, root) / file).is_file()]


def _kind(name: str) -> Any:
    """torchvision's class. It would refuse CIFAR files other than the published ones, e.g. a smaller selection."""
    from torchvision import datasets

    kind = getattr(datasets, name)
    if not hasattr(kind, "train_list"):
        return kind
    lists = {part: [[file, None] for file, _ in getattr(kind, part)] for part in ("train_list", "test_list")}
    return type(name, (kind,), {**lists, "meta": {**kind.meta, "md5": None}})
