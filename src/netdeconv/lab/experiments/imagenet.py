"""Classification by the recipe for ImageNet: batch normalisation at several rates, network deconvolution."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from netdeconv.lab.data.generated import write_image_folder
from netdeconv.lab.experiments.by_recipe import GENERATED, Measure, compared, folder_of, present_compared
from netdeconv.lab.experiments.experiment import Experiment, Presentation
from netdeconv.lab.norms import NORMS
from netdeconv.lab.options import check_fields, option
from netdeconv.lab.published import IMAGENET, PAPER, STUDY
from netdeconv.lab.report import Table
from netdeconv.lab.train import RECIPE_CODE
from netdeconv.lab.workspace import Workspace

__all__ = ["EXPERIMENT", "ImageNetSettings"]

_MEASURE = Measure("validation/accuracy", "top-1 accuracy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageNetSettings:
    """What is trained."""

    data: str = option("cifar10-jpeg", "generated, or a folder of train and val or test below NETDECONV_DATA")
    recipe: str = option("imagenet-90-epochs", "recipe of netdeconv fit")
    network: str = option("torchvision:resnet18", "classification network")
    bn_rates: tuple[float, ...] = option((0.1, 0.02), "learning rates of batch normalisation")
    nd_rates: tuple[float, ...] = option((0.1,), "learning rates of network deconvolution")
    seeds: int = option(1, "trainings at every rate")
    epochs: int = option(1, "passes over the training images")
    batch_size: int = option(256, "images in a training batch")
    image_size: int = option(64, "side of the images")
    workers: int = option(0, "processes that read images")

    def __post_init__(self) -> None:
        check_fields(self, may_be_zero=("workers",))


def run(settings: ImageNetSettings, workspace: Workspace) -> dict[str, Any]:
    """Train, by the recipe."""
    options = ("--data.image_size", str(settings.image_size), "--data.num_workers", str(settings.workers))
    generate = functools.partial(write_image_folder, each=4, size=48)
    with folder_of(settings.data, generate) as data:
        classes = len([folder for folder in (data / "train").iterdir() if folder.is_dir()])
        return compared(workspace, settings, data, options, classes=classes)


def present(result: Mapping[str, Any]) -> Presentation:
    """What came out, and what was published."""
    used = result["settings"]
    epochs = "1 epoch" if used["epochs"] == 1 else f"{used['epochs']} epochs"
    note = (
        f"Data: {used['data']}, {result['classes']} classes, images of {used['image_size']} pixels as the recipe "
        f"augments them; {used['network']} from random weights; recipe {used['recipe']} (SGD with momentum 0.9, weight "
        f"decay 1e-4, cosine schedule), batches of {used['batch_size']}, {epochs}."
    )
    return present_compared(result, _MEASURE, note=note, name="imagenet", published=[_published()])


def _published() -> Table:
    rows = [
        [row.network, str(NORMS[row.norm]), *(f"{value:.2f} %" for value in row.paper + row.study)] for row in IMAGENET
    ]
    columns = ["network", "method", "top-1, paper", "top-5, paper", "top-1, study", "top-5, study"]
    note = (
        f"{PAPER}, table 2; {STUDY}. 90 epochs of ImageNet, batches of 256, for comparison: at "
        "--size paper alone are data, image size and epochs those of the table."
    )
    return Table(columns, rows, title="Published, on ImageNet", note=note)


EXPERIMENT = Experiment(
    name="imagenet",
    claim="On ImageNet network deconvolution is more accurate than batch normalisation.",
    source="table 2",
    sizes={
        "smoke": ImageNetSettings(data=GENERATED, bn_rates=(0.1,), batch_size=8, image_size=32),
        "small": ImageNetSettings(),
        "paper": ImageNetSettings(data="imagenet", bn_rates=(0.1,), epochs=90, image_size=224, workers=8),
    },
    run=run,
    present=present,
    code=("lab/experiments/imagenet.py", "lab/experiments/by_recipe.py", *RECIPE_CODE),
)
