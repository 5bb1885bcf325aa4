"""Recipes hold the published settings, and everything in them can be built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import data_trees
from netdeconv import WhitenedConv2d, cli

pytest.importorskip("lightning")
pytest.importorskip("torchvision")

from netdeconv.lab.fit_command import built
from netdeconv.lab.tasks import Classification, Segmentation
from netdeconv.lab.training.arguments import full_arguments
from netdeconv.lab.training.recipes import recipe_path, recipes

COSINE = ("cosine", 128, 0.1, 1e-3)

# name -> data set, epochs, and schedule, batch size, learning rate and weight decay; Ye et al., ICLR 2020, section 5
# and appendix, and the defaults of the authors' command line.
PUBLISHED: dict[str, tuple[str, int, tuple[str, int, float, float]]] = {
    **{
        f"cifar{classes}-{epochs}-epoch{'s' * (epochs > 1)}": (f"cifar{classes}", epochs, COSINE)
        for classes in (10, 100)
        for epochs in (1, 20, 100)
    },
    "mnist": ("mnist", 20, COSINE),
    "fashion-mnist": ("fashion_mnist", 20, COSINE),
    "imagenet-90-epochs": ("imagenet", 90, ("cosine", 256, 0.1, 1e-4)),
    "cityscapes-deeplabv3": ("cityscapes", 30, ("poly", 8, 0.1, 1e-4)),
    "cityscapes-fcn": ("cityscapes", 30, ("poly", 8, 0.1, 1e-4)),
    "digits": ("digits", 5, ("cosine", 64, 0.1, 5e-4)),
}


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trees")
    data_trees.image_folder(root / "imagenet")
    return root


def test_every_recipe_is_known_and_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(recipes()) == set(PUBLISHED)
    assert cli.main(["recipes"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(recipes())
    assert listed.index(next(x for x in listed if "20-epochs" in x)) < listed.index(
        next(x for x in listed if "100-epochs" in x)
    )


def test_recipes_need_their_name_only(tmp_path: Path) -> None:
    assert recipe_path("digits").read_text(encoding="utf-8").startswith("# ")
    own = tmp_path / "own.yaml"
    own.write_text("network: small\n")
    assert recipe_path(str(own)) == own


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_builds_the_published_training(name: str, trees: Path, tmp_path: Path) -> None:
    data, epochs, (schedule, batch_size, rate, decay) = PUBLISHED[name]
    options = [f"--config={name}", "--trainer.accelerator=cpu", f"--out={tmp_path}"]
    if name.startswith("cityscapes"):  # the published networks are large; that they build is tested with the norms
        assert yaml.safe_load(recipe_path(name).read_text())["network"] == f"torchvision:{name[11:]}_resnet50"
        options.append("--network=torchvision:lraspp_mobilenet_v3_large")
    elif name.startswith("imagenet"):
        options.append(f"--data.root={trees}")
    else:
        options.append("--width=0.125")
    found: Any = built("fit", full_arguments("fit", options))
    assert (found.config.data["name"], found.config.data["batch_size"]) == (data, batch_size)
    assert (found.trainer.max_epochs, found.model.schedule.name) == (epochs, schedule)
    assert isinstance(found.model, Segmentation if data == "cityscapes" else Classification)
    group = found.model.configure_optimizers()["optimizer"].param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (rate, 0.9, decay, False)
    assert any(isinstance(module, WhitenedConv2d) for module in found.model.net.modules())
