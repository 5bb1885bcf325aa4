"""Small generated data sets in the layout of the real ones: a few images each, written to a folder."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np

from netdeconv.lab.data.generated import write_cityscapes as cityscapes
from netdeconv.lab.data.generated import write_image_folder as image_folder

__all__ = ["cifar", "cityscapes", "image_folder", "mnist"]


class _Dtype:
    """numpy's ``uint8`` as the published CIFAR files hold it, which Python 2 wrote: with numbers for booleans."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0)


class _Array:
    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __reduce__(self) -> tuple[Any, ...]:
        make, _, _ = self.values.__reduce__()
        return make, (np.ndarray, (0,), b"b"), (1, self.values.shape, _Dtype(), False, self.values.tobytes())


def mnist(root: Path, *, name: str = "MNIST", train: int = 20, test: int = 10) -> dict[str, np.ndarray]:
    """Write ``root/NAME/raw/*-ubyte``; image ``i`` of a part has the label ``i % 10``.

    Returns:
        For "train" and "test" the images ``(N, 28, 28)``.
    """
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    images = {}
    for part, count in (("train", train), ("t10k", test)):
        values = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + values.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())
        images["train" if part == "train" else "test"] = values
    return images


def cifar(root: Path, *, classes: int = 100, train: int = 20, test: int = 10) -> dict[str, np.ndarray]:
    """Write ``root/cifar-100-python`` or ``root/cifar-10-batches-py``; image ``i`` has the label ``i % classes``.

    Returns:
        For "train" and "test" the images ``(N, 3, 32, 32)``.
    """
    folder = root / ("cifar-100-python" if classes == 100 else "cifar-10-batches-py")
    folder.mkdir(parents=True)
    key = "fine_labels" if classes == 100 else "labels"
    meta = ("meta", "fine_label_names") if classes == 100 else ("batches.meta", "label_names")
    train_files = ["train"] if classes == 100 else [f"data_batch_{i}" for i in range(1, 6)]
    files = {"train": train_files, "test": ["test"] if classes == 100 else ["test_batch"]}
    images = {}
    for part, count in (("train", train), ("test", test)):
        values = np.random.default_rng(count).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        for name, index in zip(files[part], np.array_split(np.arange(count), len(files[part])), strict=True):
            content = {"data": _Array(values[index].reshape(-1, 3072)), key: [int(i) % classes for i in index]}
            (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        images[part] = values
    (folder / meta[0]).write_bytes(pickle.dumps({meta[1]: [f"class{i}" for i in range(classes)]}, protocol=2))
    return images
