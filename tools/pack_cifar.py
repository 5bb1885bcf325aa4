"""CIFAR-10 from an archive of images, ``{train,test}/CLASS/*`` below some folder, as the files that torchvision reads.

    python3 tools/pack_cifar.py cifar10-jpeg.tar.xz DIR    # writes DIR/cifar-10-batches-py

Images are decoded once, and 60,000 files are never written: of many trainings that start together each then reads them
in a second. Their order is that of ``cifar10-jpeg`` read as a folder, so that the trainings are the same.
"""

from __future__ import annotations

import os
import pickle
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["FOLDER", "pack"]

FOLDER = "cifar-10-batches-py"
_FILES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}


def pack(archive: Path, root: Path) -> Path:
    """Write ``root/cifar-10-batches-py`` from an archive, unless it is there; it is whole or not there."""
    place = root / FOLDER
    if place.is_dir():
        return place
    images = _images(archive)
    classes = sorted({name for _, name, _ in images})
    root.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=root, prefix=".part-"))
    _dump(part / "batches.meta", {"label_names": classes})
    for kind, files in _FILES.items():
        mine = sorted(key for key in images if key[0] == kind)
        for file, keys in zip(files, np.array_split(np.arange(len(mine)), len(files)), strict=True):
            data = np.stack([images[mine[i]].transpose(2, 0, 1).ravel() for i in keys])
            _dump(part / file, {"data": data, "labels": [classes.index(mine[i][1]) for i in keys]})
    os.replace(part, place)
    return place


def _images(archive: Path) -> dict[tuple[str, ...], np.ndarray]:
    """(part, class, file) -> pixels ``(32, 32, 3)``."""
    found = {}
    with tarfile.open(archive) as members:
        for member in members:
            if (file := members.extractfile(member)) is not None:
                with Image.open(file) as image:
                    found[Path(member.name).parts[-3:]] = np.asarray(image.convert("RGB"))
    return found


def _dump(path: Path, content: dict[str, object]) -> None:
    path.write_bytes(pickle.dumps(content))


if __name__ == "__main__":
    print(pack(Path(sys.argv[1]), Path(sys.argv[2])))
