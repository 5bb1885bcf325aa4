"""Small generated data in the layouts of ImageNet and Cityscapes, to try a whole pipeline without either."""

from __future__ import annotations

from pathlib import Path

import numpy as np

__all__ = ["write_cityscapes", "write_image_folder"]


def write_image_folder(
    root: Path, parts: tuple[str, ...] = ("train", "val"), *, classes: int = 3, each: int = 4, size: int = 40
) -> None:
    """Write ``root/PART/CLASS/*.JPEG``: in class ``c``, image ``i`` is all ``(80 c, 20 i, 128)``, modulo 256."""
    from PIL import Image

    for part in parts:
        for label in range(classes):
            folder = root / part / f"n{label:08d}"
            folder.mkdir(parents=True)
            for index in range(each):
                colour = (80 * label % 256, 20 * index % 256, 128)
                Image.new("RGB", (size + 8 * index, size), colour).save(folder / f"{index}.JPEG", quality=95)


def write_cityscapes(
    root: Path, splits: tuple[str, ...] = ("train", "val"), *, each: int = 4, height: int = 64, width: int = 128
) -> None:
    """Write ``leftImg8bit`` and ``gtFine``: in image ``i``, columns are red as ``7 x`` their label id, from 0 to 33."""
    from PIL import Image

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
