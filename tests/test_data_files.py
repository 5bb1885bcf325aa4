"""Data sets that are read from image files by workers, on generated trees: ImageNet, any folder, Cityscapes."""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lightning")
pytest.importorskip("torchvision")

import torch
from PIL import Image

import data_trees
from netdeconv import ConfigError
from netdeconv.lab.data import CityscapesData, ImageFolderData, ImageNetData, create_data
from netdeconv.lab.data.cityscapes import train_ids

REAL = os.environ.get("NETDECONV_DATA")
MEAN, SD = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

# Python 3.12 and later say so wherever workers are forked from a process with threads, which torch's are.
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def folders(root: Path, **options: Any) -> ImageFolderData:
    settings: dict[str, Any] = {"root": root, "batch_size": 4, "num_workers": 0, "image_size": 32, **options}
    data = ImageFolderData(**settings)
    data.setup("fit")
    return data


def streets(root: Path, **options: Any) -> CityscapesData:
    sizes: dict[str, Any] = {"image_size": 48, "base_size": 64, "batch_size": 2, "num_workers": 0}
    data = CityscapesData(root=root, **{**sizes, **options})
    data.setup("fit")
    return data


def pixels(images: torch.Tensor) -> torch.Tensor:
    """Back from standardised values to 0 to 255."""
    return 255 * (images * SD + MEAN)


def taken(batches: Any) -> list[tuple[bytes, bytes]]:
    return [(images.numpy().tobytes(), labels.numpy().tobytes()) for images, labels in batches]


# ----------------------------------------------------------------------------------------------------- image folders


def test_images_and_labels_belong_together(tmp_path: Path) -> None:
    data_trees.image_folder(tmp_path)
    data = folders(tmp_path)
    assert (data.num_classes, data.task) == (3, "classification")
    for batches in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        seen = []
        for images, labels in batches:
            assert images.shape[1:] == (3, 32, 32)
            red, green, blue = pixels(images).round().mean((2, 3)).unbind(1)
            assert (red - 80 * labels).abs().max() < 3  # JPEG
            assert (blue - 128).abs().max() < 3
            seen += zip(labels.tolist(), (green / 20).round().int().tolist(), strict=True)
        assert sorted(seen) == [(label, index) for label in range(3) for index in range(4)]
    assert [labels.tolist() for _, labels in data.val_dataloader()] == [[0] * 4, [1] * 4, [2] * 4]


def test_evaluation_resizes_and_takes_the_middle(tmp_path: Path) -> None:
    data_trees.image_folder(tmp_path, classes=1, each=1)
    values = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    (tmp_path / "val" / "n00000000" / "0.JPEG").unlink()
    Image.fromarray(values).save(tmp_path / "val" / "n00000000" / "0.png")
    assert folders(tmp_path, image_size=224).resize == 256
    data = folders(tmp_path, image_size=32, resize=48)
    ((images, _),) = data.val_dataloader()
    expected = Image.fromarray(values).resize((80, 48), Image.Resampling.BILINEAR).crop((24, 8, 56, 40))
    assert np.array_equal(pixels(images)[0].round().permute(1, 2, 0).numpy(), np.asarray(expected))


def test_training_images_are_cut_out_and_mirrored(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(0, 240, 2, dtype=np.uint8)[None, :, None], (120, 1, 3))
    for part in ("train", "val"):
        (tmp_path / part / "ramps").mkdir(parents=True)
        for index in range(4):
            Image.fromarray(ramp).save(tmp_path / part / "ramps" / f"{index}.png")
    batches = folders(tmp_path).train_dataloader()
    steps = []
    for epoch in range(10):
        batches.set_epoch(epoch)
        ((images, _),) = batches
        rows = pixels(images)[:, 0, 16]
        steps.append(rows[:, -1] - rows[:, 0])
    assert all(len(found.unique()) == 4 for found in steps)  # four times the same image, not the same part of it
    widths = torch.cat(steps)
    assert widths.min() < 0 < widths.max()
    assert widths.abs().min() < 90 < 180 < widths.abs().max() <= 240  # random parts of a ramp from 0 to 238


@forks
def test_augmentation_is_by_seed_epoch_and_image_alone(tmp_path: Path) -> None:
    data_trees.image_folder(tmp_path, ("train", "test"))
    batches = folders(tmp_path).train_dataloader()
    state = torch.get_rng_state()
    first, second = taken(batches), taken(batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert first != second
    torch.manual_seed(3)
    workers = folders(tmp_path, num_workers=2).train_dataloader()
    assert [taken(workers), taken(workers)] == [first, second]
    assert taken(folders(tmp_path, seed=1).train_dataloader()) != first
    singles = {images.numpy().tobytes() for images, _ in folders(tmp_path, batch_size=1).train_dataloader()}
    length = 4 * 3 * 32 * 32  # bytes of an image
    assert {images[start : start + length] for images, _ in first for start in range(0, 4 * length, length)} == singles
    torch.set_rng_state(state)


def test_reading_goes_on_in_mid_epoch(tmp_path: Path) -> None:
    data_trees.image_folder(tmp_path)
    batches = folders(tmp_path, batch_size=2).train_dataloader()
    whole = [taken(batches), taken(batches)]
    batches = folders(tmp_path, batch_size=2).train_dataloader()
    taken(batches)
    list(itertools.islice(batches, 4))
    resumed = folders(tmp_path, batch_size=2).train_dataloader()
    resumed.load_state_dict(batches.state_dict())
    assert taken(resumed) == whole[1][4:]


def test_parts_and_classes_are_found_by_name(tmp_path: Path) -> None:
    data_trees.image_folder(tmp_path, ("train", "test"))
    for path in [*(tmp_path / "test" / "n00000001").iterdir(), tmp_path / "test" / "n00000001"]:
        path.unlink() if path.is_file() else path.rmdir()
    data = folders(tmp_path)  # no folder val, and a class without test images
    for batches in (data.val_dataloader(), data.test_dataloader()):
        assert [labels.tolist() for _, labels in batches] == [[0] * 4, [2] * 4]
    (tmp_path / "test" / "n00000002").rename(tmp_path / "test" / "other")
    with pytest.raises(ConfigError, match=r"classes of the training part in \S+test, got 1 others: other"):
        folders(tmp_path)


def test_imagenet_is_found_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_trees.image_folder(tmp_path / "imagenet", classes=2)
    monkeypatch.setenv("NETDECONV_DATA", str(tmp_path))
    for root in (None, tmp_path, tmp_path / "imagenet"):
        data = create_data("imagenet", root=root, image_size=16, num_workers=0)
        assert isinstance(data, ImageNetData)
        data.setup("fit")
        assert (data.num_classes, len(data.parts["train"])) == (2, 8)
    images, _ = next(iter(data.val_dataloader()))
    assert images.shape == (8, 3, 16, 16)


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        (ImageFolderData, r"Expected root/train/CLASS/\* and root/val/CLASS/\*"),
        (ImageNetData, r"With the archives from image-net.org in FOLDER, unpack them with  python -c"),
    ],
)
def test_missing_folders_say_what_is_expected(kind: type[ImageFolderData], hint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"expected \S+train, which is not there\. .*{hint}"):
        kind(root=tmp_path).setup("fit")
    data_trees.image_folder(tmp_path, ("train",))
    with pytest.raises(ConfigError, match=r"expected \S+val, which is not there"):
        kind(root=tmp_path).setup("fit")
    (tmp_path / "val").mkdir()
    with pytest.raises(ConfigError, match=r"expected images in \S+val: couldn't find any class folder in .*Expected"):
        kind(root=tmp_path).setup("fit")
    (tmp_path / "val" / "n00000000").mkdir()
    with pytest.raises(ConfigError, match=r"images in \S+val: found no valid file for the classes n00000000\. Exp"):
        kind(root=tmp_path).setup("fit")


def test_the_command_for_imagenet_can_be_run() -> None:
    command = re.search(r'python -c "(.+)"', ImageNetData._hint)
    assert command
    compile(command[1], "command", "exec")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size from 1 to resize, got image_size 0 and resize 0"),
        ({"image_size": 64, "resize": 32}, "image_size from 1 to resize, got image_size 64 and resize 32"),
        ({"num_workers": -1}, "num_workers of at least 0, got -1"),
    ],
)
def test_wrong_sizes(options: dict[str, int], message: str, tmp_path: Path) -> None:
    data_trees.image_folder(tmp_path)
    with pytest.raises(ConfigError, match=message):
        folders(tmp_path, **options).train_dataloader()


# --------------------------------------------------------------------------------------------------------- broken files


@forks
@pytest.mark.parametrize("workers", [0, 1])
def test_broken_files_are_named_once(workers: int, tmp_path: Path) -> None:
    data_trees.image_folder(tmp_path)
    broken = {part: tmp_path / part / "n00000001" / "2.JPEG" for part in ("train", "val")}
    for path in broken.values():
        path.write_bytes(path.read_bytes()[:400])
    data = folders(tmp_path, num_workers=workers)
    for part, batches, counts in (
        ("train", data.train_dataloader(), [4, 4, 4]),  # image 3 of the class twice
        ("val", data.val_dataloader(), [4, 3, 4]),
    ):
        with pytest.warns(
            UserWarning, match=rf"one image file left out that cannot be read: {broken[part]} \("
        ) as caught:
            labels = [label for _, label in batches]
        assert len(caught) == 1
        assert [len(label) for label in labels] == counts
        assert torch.cat(labels).bincount().tolist() == [4, 4 if part == "train" else 3, 4]
        assert len(list(batches)) == 3  # and not named again, which would be an error here
    strict = folders(tmp_path, num_workers=workers, strict=True)
    for batches in (strict.train_dataloader(), strict.val_dataloader()):
        with pytest.raises(ConfigError, match=r"can be read, got \S+2\.JPEG \(.*Without strict, such files are left"):
            list(batches)


def test_nothing_but_broken_files_is_an_error(tmp_path: Path) -> None:
    data_trees.image_folder(tmp_path, classes=2, each=2)
    for path in tmp_path.rglob("*.JPEG"):
        path.write_bytes(b"no image")
    data = folders(tmp_path)
    with pytest.warns(UserWarning, match="4 image files left out that"):
        assert list(data.val_dataloader()) == []
    with (
        pytest.warns(UserWarning, match="left out that cannot be read"),
        pytest.raises(ConfigError, match=r"100 files in a row that cannot be read: \S+JPEG \("),
    ):
        list(data.train_dataloader())


# ---------------------------------------------------------------------------------------------------------- Cityscapes


def test_label_ids_become_the_nineteen_classes() -> None:
    # Of cityscapesscripts/helpers/labels.py: road, sidewalk, building, wall, fence, pole, light, sign, vegetation,
    # terrain, sky, person, rider, car, truck, bus, train, motorcycle, bicycle.
    evaluated = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    expected = torch.full((256,), 255)
    for train_id, label_id in enumerate(evaluated):
        expected[label_id] = train_id
    assert torch.equal(train_ids().long(), expected)


def fits(red: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Where a pixel's red value is that of its label, in a generated scene."""
    return labels == train_ids()[(red / 7).round().long().clamp(0, 33)]


def test_evaluation_shows_whole_images(tmp_path: Path) -> None:
    data_trees.cityscapes(tmp_path)
    data = streets(tmp_path)
    assert (data.task, data.num_classes, data.ignore_index) == ("segmentation", 19, 255)
    assert data.test_dataloader().samples is data.parts["val"]
    found = list(data.val_dataloader())
    assert [images.shape for images, _ in found] == [(1, 3, 64, 128)] * 4
    for index, (images, labels) in enumerate(found):
        assert labels.dtype == torch.int64
        red, green, _ = pixels(images)[0].round()
        assert fits(red, labels[0]).all()
        assert (green == 20 * index).all()
        assert labels.unique().tolist() == [*range(19), 255]
    half, labels = next(iter(streets(tmp_path, base_size=32).val_dataloader()))
    assert half.shape == (1, 3, 32, 64)
    assert labels.shape == (1, 32, 64)
    assert set(labels.unique().tolist()) <= {*range(19), 255}


def test_training_moves_image_and_labels_alike(tmp_path: Path) -> None:
    data_trees.cityscapes(tmp_path)
    batches = streets(tmp_path).train_dataloader()
    directions, bordered = set(), 0
    for images, labels in itertools.chain(*(list(batches) for _ in range(6))):
        assert (images.shape, labels.shape) == ((2, 3, 48, 48), (2, 48, 48))
        for image, label in zip(pixels(images).round(), labels, strict=True):
            inside = image[2] > 25  # blue is 50 in scenes, 0 in the border
            assert (label[~inside] == 255).all()
            bordered += int(not inside.all())
            # Resizing mixes neighbours' colours and not their labels, so borders of stripes do not fit.
            assert fits(image[0], label)[inside].float().mean() > 0.6
            row = int(inside.sum(1).argmax())
            columns = inside[row].nonzero().flatten()
            directions.add(bool(image[0, row, columns[-1]] > image[0, row, columns[0]]))
    assert directions == {True, False}
    assert bordered


def test_broken_scenes_are_named(tmp_path: Path) -> None:
    data_trees.cityscapes(tmp_path)
    images, labels = (sorted((tmp_path / kind / "val" / "town").iterdir()) for kind in ("leftImg8bit", "gtFine"))
    images[0].write_bytes(images[0].read_bytes()[:60])
    labels[1].unlink()
    Image.new("L", (128, 60)).save(labels[2])
    with pytest.warns(UserWarning) as caught:
        assert len(list(streets(tmp_path).val_dataloader())) == 1
    said = [str(warning.message) for warning in caught]
    assert len(said) == 3
    assert str(images[0]) in said[0]
    assert str(labels[1]) in said[1]
    assert f"{images[2]} ((64, 128) pixels with labels (60, 128) of torch.uint8)" in said[2]


def test_missing_scenes_say_what_is_expected(tmp_path: Path) -> None:
    hint = r"Expected leftImg8bit/{train,val}/CITY/\*_leftImg8bit.png .*gtFine_trainvaltest.zip"
    with pytest.raises(ConfigError, match=rf"expected \S+leftImg8bit/train, which is not there\. {hint}"):
        streets(tmp_path)
    data_trees.cityscapes(tmp_path / "cityscapes")
    assert len(streets(tmp_path).parts["val"]) == 4
    with pytest.raises(ConfigError, match=r"expected \S+leftImg8bit/test, which is not there"):
        streets(tmp_path, test_split="test")
    for path in (tmp_path / "cityscapes" / "leftImg8bit" / "val" / "town").iterdir():
        path.unlink()
    with pytest.raises(ConfigError, match=r"expected images in \S+val, found none\. Expected"):
        streets(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (2.0, 0.5)}, r"scale of two numbers above 0, the smaller first, got \(2.0, 0.5\)"),
        ({"base_size": 0}, "sizes of at least 1, got image_size 48, base_size 0"),
    ],
)
def test_wrong_settings(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        streets(tmp_path, **options)


# --------------------------------------------------------------------------------------------------------- real images


@pytest.mark.real_data
@pytest.mark.skipif(not REAL, reason="NETDECONV_DATA is not set")
def test_real_images_are_read() -> None:
    data = streets(Path(str(REAL)) / "camvid-cityscapes", image_size=160, base_size=180, test_split="test")
    assert [len(data.parts[part]) for part in ("train", "val", "test")] == [367, 101, 233]
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape, labels.shape) == ((2, 3, 160, 160), (2, 160, 160))
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (1, 3, 180, 240)
    counts = labels[labels != 255].bincount(minlength=19)
    assert len(counts) == 19
    assert 0 in counts.topk(3).indices  # road
    jpegs = folders(Path(str(REAL)) / "cifar10-jpeg")
    assert (jpegs.num_classes, len(jpegs.parts["train"]), len(jpegs.parts["val"])) == (10, 50_000, 10_000)
