"""Data sets that are held in memory, on generated files in their real layout, and the names of all data sets."""

from __future__ import annotations

import functools
import http.server
import os
import re
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lightning")
pytest.importorskip("torchvision")

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule
from PIL import Image
from torchvision import datasets

import data_trees
from netdeconv import ConfigError
from netdeconv.lab.data import DATASETS, CIFAR10Data, CIFAR100Data, DigitsData, MNISTData, create_data

REAL = os.environ.get("NETDECONV_DATA")


def ready(name: str, **options: Any) -> Any:
    data = create_data(name, **options)
    data.prepare_data()
    data.setup("fit")
    return data


# ------------------------------------------------------------------------------------------------------------- names


def test_every_name_makes_a_module_with_the_same_attributes(tmp_path: Path) -> None:
    data_trees.image_folder(tmp_path, classes=3)
    for name in DATASETS:
        data = create_data(name, root=tmp_path, batch_size=3, seed=4)
        assert isinstance(data, LightningDataModule)
        assert (data.batch_size, data.seed) == (3, 4)
        assert data.task == ("segmentation" if name == "cityscapes" else "classification")
        assert data.in_channels == (1 if name in ("digits", "mnist", "fashion_mnist") else 3)
        sizes = {"digits": 8, "imagenet": 224, "image_folder": 224, "cityscapes": 480}
        assert data.image_size == sizes.get(name, 32)
        classes = {"cifar100": 100, "cityscapes": 19, "imagenet": 3, "image_folder": 3}
        assert data.num_classes == classes.get(name, 10)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"got 'cifar-10'\. The nearest name is cifar10"):
        create_data("cifar-10")


@pytest.mark.parametrize("name", DATASETS)
def test_every_option_has_its_help(name: str) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(DATASETS[name], "data")
    text = re.sub(r"\s+", " ", parser.format_help())
    options = re.findall(r"--data\.(\w+) \S+ (.{12})", text.split("options:")[1])
    assert {"root", "batch_size", "seed"} <= {option for option, _ in options}
    assert [option for option, start in options if not re.match(r"[a-z0-9]", start) or "(type" in start] == []


# ----------------------------------------------------------------------------------------------- MNIST, Fashion-MNIST


@pytest.mark.parametrize(("name", "folder", "mean", "sd"), [
    ("mnist", "MNIST", 0.1307, 0.3081),
    ("fashion_mnist", "FashionMNIST", 0.2860, 0.3530),
])  # fmt: skip
def test_grey_images_sit_in_the_middle_of_a_black_square(
    name: str, folder: str, mean: float, sd: float, tmp_path: Path
) -> None:
    images = data_trees.mnist(tmp_path, name=folder)
    data = ready(name, root=tmp_path, batch_size=8)
    for batches, part in ((data.val_dataloader(), "test"), (data.test_dataloader(), "test")):
        ((found, labels),) = batches
        expected = np.zeros((10, 1, 32, 32))
        expected[:, 0, 2:30, 2:30] = images[part]
        np.testing.assert_allclose(found.numpy(), (expected / 255 - mean) / sd, atol=1e-5)
        assert labels.tolist() == list(range(10))
    by_label = {}
    for found, labels in data.train_dataloader():
        assert found.shape[1:] == (1, 32, 32)
        pixels = ((found * sd + mean) * 255).round().byte()
        by_label.update({bytes(x.numpy()): int(y) for x, y in zip(pixels, labels, strict=True)})
    for index, image in enumerate(images["train"]):
        assert by_label[np.pad(image, 2).tobytes()] == index % 10


def test_the_border_is_an_option(tmp_path: Path) -> None:
    images = data_trees.mnist(tmp_path)
    data = ready("mnist", root=tmp_path, image_size=28)
    assert np.array_equal(data.parts["train"][0][:, 0].numpy(), images["train"])
    odd = ready("mnist", root=tmp_path, image_size=31).parts["train"][0]
    assert np.array_equal(odd[:, 0, 1:29, 1:29].numpy(), images["train"])
    assert odd.sum() == images["train"].sum()
    with pytest.raises(ConfigError, match="image_size of at least 28, got 24"):
        MNISTData(image_size=24)


# --------------------------------------------------------------------------------------------------------- the CIFARs


@pytest.mark.parametrize(("kind", "classes", "mean"), [(CIFAR10Data, 10, 0.4914), (CIFAR100Data, 100, 0.5071)])
def test_cifar_files_are_read(kind: Any, classes: int, mean: float, tmp_path: Path) -> None:
    images = data_trees.cifar(tmp_path, classes=classes, train=120)
    data = kind(root=tmp_path, batch_size=50)
    data.setup()
    for part in ("train", "test"):
        found, labels = data.parts[part]
        assert np.array_equal(found.numpy(), images[part])
        assert labels.tolist() == [i % classes for i in range(len(labels))]
    evaluated, _ = next(iter(data.val_dataloader()))
    red = {10: 0.2023, 100: 0.2009}[classes]
    np.testing.assert_allclose(evaluated[:, 0].numpy(), (images["test"][:, 0] / 255 - mean) / red, atol=1e-5)
    train = [batch.shape for batch, _ in data.train_dataloader()]
    assert train == [(50, 3, 32, 32), (50, 3, 32, 32), (20, 3, 32, 32)]


def test_training_images_are_shifted_and_black_moves_in(tmp_path: Path) -> None:
    images = data_trees.cifar(tmp_path)
    data = ready("cifar100", root=tmp_path, batch_size=20)
    ((batch, labels),) = data.train_dataloader()
    pixels = batch * torch.tensor(data.sd).view(3, 1, 1) + torch.tensor(data.mean).view(3, 1, 1)
    pixels = (255 * pixels).round().numpy()
    for pixel, label in zip(pixels, labels.tolist(), strict=True):
        padded = np.pad(images["train"][label], ((0, 0), (4, 4), (4, 4)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (32, 32), (1, 2)).transpose(1, 2, 0, 3, 4)
        hits = [np.equal(windows, image).all((2, 3, 4)).sum() for image in (pixel, pixel[:, :, ::-1])]
        assert sorted(hits) == [0, 1]


def test_validation_images_are_set_aside(tmp_path: Path) -> None:
    images = data_trees.cifar(tmp_path)
    data, again = (ready("cifar100", root=tmp_path, validation=6, seed=seed) for seed in (0, 1))
    parts = {part: {bytes(x.numpy()) for x in found} for part, (found, _) in data.parts.items()}
    assert [len(parts[part]) for part in ("train", "validation", "test")] == [14, 6, 10]
    assert parts["train"] | parts["validation"] == {image.tobytes() for image in images["train"]}
    assert torch.equal(data.parts["validation"][0], again.parts["validation"][0])
    assert next(iter(data.val_dataloader()))[1].tolist() == data.parts["validation"][1].tolist()
    assert next(iter(data.test_dataloader()))[1].tolist() == list(range(10))
    with pytest.raises(ConfigError, match="validation of 0 to 19 images, got 20"):
        ready("cifar100", root=tmp_path, validation=20)


def jpegs(root: Path) -> Path:
    for part, label in ((part, label) for part in ("train", "test") for label in range(10)):
        folder = root / "cifar10-jpeg" / part / f"class{label}"
        folder.mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (32, 32), (20 * label, 100, 50)).save(folder / f"{index}.jpg")
    return root / "cifar10-jpeg"


def test_broken_files_are_named_and_left_out(tmp_path: Path) -> None:
    folder = jpegs(tmp_path) / "train" / "class3"
    whole = (folder / "0.jpg").read_bytes()
    (folder / "0.jpg").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (30, 32)).save(folder / "1.jpg")
    with pytest.warns(UserWarning, match="2 image files left out") as caught:
        data = ready("cifar10", root=tmp_path)
    message = str(caught[0].message)
    assert f"{folder / '0.jpg'} (" in message
    assert f"{folder / '1.jpg'} (30x32 pixels where 32x32 are expected)" in message
    images, labels = data.parts["train"]
    assert labels.bincount().tolist() == [2, 2, 2, 0, 2, 2, 2, 2, 2, 2]
    assert (images[:, 0, 0, 0].int() - 20 * labels).abs().max() <= 3  # JPEG
    with pytest.raises(ConfigError, match=r"can be read, got .*0\.jpg \(.*Without strict, such files are left out"):
        ready("cifar10", root=tmp_path, strict=True)


def test_folders_of_images_are_ten(tmp_path: Path) -> None:
    folder = jpegs(tmp_path) / "test"
    for path in (folder / "class3").iterdir():
        path.unlink()
    with pytest.raises(ConfigError, match=r"images in \S+test: found no valid file for the classes class3"):
        ready("cifar10", root=tmp_path)
    (folder / "class3").rmdir()
    with pytest.raises(ConfigError, match=r"10 folders with images in \S+test, one a class, got 9"):
        ready("cifar10", root=tmp_path)


# ------------------------------------------------------------------------------------------- missing, damaged, fetched


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("mnist", "MNIST/raw"),
        ("fashion_mnist", "FashionMNIST/raw"),
        ("cifar10", "cifar10-jpeg"),
        ("cifar100", "cifar-100-python"),
    ],
)
def test_missing_data_say_how_to_get_them(name: str, place: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        ready(name, root=tmp_path)
    message = str(caught.value)
    assert str(tmp_path / place) in message
    command = re.search(r'python -c "(.+)"', message)
    assert command
    compile(command[1], "command", "exec")
    kind = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}.get(name, name.upper())
    assert f"import {kind}; {kind}('{tmp_path}', download=True)" in command[1]


def test_the_root_is_an_option_or_the_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_trees.mnist(tmp_path / "here")
    monkeypatch.setenv("NETDECONV_DATA", str(tmp_path / "here"))
    assert len(ready("mnist").parts["train"][1]) == 20
    with pytest.raises(ConfigError, match=r"in the option root, got '\S+gone', which is no folder"):
        ready("mnist", root=tmp_path / "gone")
    monkeypatch.delenv("NETDECONV_DATA")
    with pytest.raises(ConfigError, match="in the environment variable NETDECONV_DATA, got None"):
        ready("mnist")


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    data_trees.mnist(tmp_path)
    data_trees.cifar(tmp_path)
    for file in (tmp_path / "MNIST/raw/train-images-idx3-ubyte", tmp_path / "cifar-100-python/test"):
        file.write_bytes(file.read_bytes()[:1000])
    for name in ("mnist", "cifar100"):
        for download in (False, True):
            with pytest.raises(ConfigError, match=r"whose files cannot be read \(.+\)\. Delete that folder") as caught:
                ready(name, root=tmp_path, download=download)
            assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_complete_is_named(tmp_path: Path) -> None:
    data_trees.mnist(tmp_path)
    (tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ConfigError, match=r"in \S+raw, which has no t10k-labels-idx1-ubyte. Get it with"):
        ready("mnist", root=tmp_path)


def test_labels_that_cannot_be_are_refused(tmp_path: Path) -> None:
    data_trees.mnist(tmp_path)
    file = tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte"
    file.write_bytes(file.read_bytes()[:-1] + b"\x0b")
    with pytest.raises(ConfigError, match=r"\(labels from 0 to 11 for 10 classes\)"):
        ready("mnist", root=tmp_path)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, http.server.HTTPServer]]:
    """A folder, and the server that gives its files away on this machine."""
    folder = tmp_path / "far"
    folder.mkdir()
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield folder, server
        server.shutdown()
        thread.join()


def test_data_are_downloaded_where_asked_for(
    served: tuple[Path, http.server.HTTPServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far, server = served
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    images = data_trees.cifar(far)
    archive = far / datasets.CIFAR100.filename
    with tarfile.open(archive, "w:gz") as file:
        file.add(far / "cifar-100-python", "cifar-100-python")
    monkeypatch.setattr(datasets.CIFAR100, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
    monkeypatch.setattr(datasets.CIFAR100, "tgz_md5", None)
    data = ready("cifar100", root=tmp_path / "new" / "folder", download=True)
    assert np.array_equal(data.parts["train"][0].numpy(), images["train"])
    archive.unlink()
    assert len(ready("cifar100", root=tmp_path / "new" / "folder", download=True).parts["test"][1]) == 10
    with pytest.raises(ConfigError, match=r"not be downloaded to \S+other \(HTTP Error 404.*copy FOLDER/cifar-100-pyt"):
        ready("cifar100", root=tmp_path / "other", download=True)


# ------------------------------------------------------------------------------------------------------------ digits


def test_digits_can_be_enlarged_and_tested() -> None:
    small, large = DigitsData(), DigitsData(image_size=32)
    small.setup()
    large.setup()
    assert large.image_size == 32
    images = large.parts["train"][0]
    assert images.shape == (997, 1, 32, 32)
    assert torch.equal(images[:, :, 2::4, 1::4], small.parts["train"][0])
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(images, 4), small.parts["train"][0])
    ((batch, labels),) = large.test_dataloader()
    assert torch.equal(batch, large.val_dataloader()[1].tensors[0])
    assert torch.equal(labels, small.parts["test"][1])
    with pytest.raises(ConfigError, match="multiple of 8, got 20"):
        DigitsData(image_size=20)
    with pytest.raises(ConfigError, match="10 images or more in each part of 1797, got validation 0 and test 400"):
        DigitsData(validation=0)


# --------------------------------------------------------------------------------------------------------- real images


@pytest.mark.real_data
@pytest.mark.skipif(not REAL, reason="NETDECONV_DATA is not set")
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_real_images_are_standardised(name: str) -> None:
    data = ready(name, image_size=28)
    assert [len(labels) for _, labels in data.parts.values()] == [60_000, 10_000]
    images, labels = data.parts["train"]
    pixels = data.standardised(images[::7])
    assert abs(pixels.mean()) < 0.01
    assert abs(pixels.std() - 1) < 0.01
    assert labels.bincount().min() > 5_000
