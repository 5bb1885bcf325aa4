"""Small generated data sets in the layout of the real ones: a few images each, written to a folder."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

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


def image_folder(
    root: Path, parts: tuple[str, ...] = ("train", "val"), *, classes: int = 3, each: int = 4, size: int = 40
) -> None:
    """Write ``root/PART/CLASS/*.JPEG``: in class ``c``, image ``i`` is all ``(80 c, 20 i, 128)``."""
    for part in parts:
        for label in range(classes):
            folder = root / part / f"n{label:08d}"
            folder.mkdir(parents=True)
            for index in range(each):
                colour = (80 * label, 20 * index, 128)
                Image.new("RGB", (size + 8 * index, size), colour).save(folder / f"{index}.JPEG", quality=95)


def cityscapes(
    root: Path, splits: tuple[str, ...] = ("train", "val"), *, each: int = 4, height: int = 64, width: int = 128
) -> None:
    """Write ``leftImg8bit`` and ``gtFine``: in image ``i``, columns are red as ``7 x`` their label id, from 0 to 33."""
    ids = (np.arange(width) * 34 // width).astype(np.uint8)
    for split in splits:
        for kind, suffix in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
            folder = root / kind / split / "town"
            folder.mkdir(parents=True)
            for index in range(each):
                values = np.tile(ids, (height, 1))
                if kind == "leftImg8bit":
                    values = np.stack([7 * values, np.full_like(values, 20 * index), np.full_like(values, 50)], axis=-1)
                Image.fromarray(values).save(folder / f"town_{index:06d}_000019_{suffix}.png")
