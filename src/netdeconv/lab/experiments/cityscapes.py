"""Segmentation of streets by the recipe for Cityscapes: batch normalisation at several rates, network deconvolution."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from netdeconv.lab.data.generated import write_cityscapes
from netdeconv.lab.experiments.by_recipe import GENERATED, Measure, compared, folder_of, present_compared
from netdeconv.lab.experiments.experiment import Experiment, Presentation
from netdeconv.lab.options import check_fields, option
from netdeconv.lab.published import CITYSCAPES_NOTE
from netdeconv.lab.train import RECIPE_CODE
from netdeconv.lab.workspace import Workspace

__all__ = ["EXPERIMENT", "CityscapesSettings"]

_MEASURE = Measure("validation/miou", "mIoU")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CityscapesSettings:
    """What is trained."""

    data: str = option("camvid-cityscapes", "generated, or a folder in Cityscapes' layout below NETDECONV_DATA")
    recipe: str = option("cityscapes-fcn", "recipe of netdeconv fit")
    network: str = option("torchvision:lraspp_mobilenet_v3_large", "segmentation network")
    bn_rates: tuple[float, ...] = option((0.1, 0.02), "learning rates of batch normalisation")
    nd_rates: tuple[float, ...] = option((0.1, 0.02), "learning rates of network deconvolution")
    nd_update_every: int = option(1, "steps between two roots of network deconvolution")
    seeds: int = option(1, "trainings at every rate")
    epochs: int = option(8, "passes over the training images")
    evaluate_every: int = option(4, "epochs between two evaluations")
    batch_size: int = option(8, "images in a training batch")
    image_size: int = option(96, "side of the squares that training images are cut to")
    base_size: int = option(180, "shorter side of the images in evaluation")
    workers: int = option(0, "processes that read images")

    def __post_init__(self) -> None:
        check_fields(self, may_be_zero=("workers",))


def run(settings: CityscapesSettings, workspace: Workspace) -> dict[str, Any]:
    """Train, by the recipe."""
    options = [
        *("--data.num_workers", str(settings.workers), "--data.image_size", str(settings.image_size)),
        *("--data.base_size", str(settings.base_size)),
        *("--trainer.check_val_every_n_epoch", str(settings.evaluate_every)),
    ]
    with folder_of(settings.data, write_cityscapes) as data:
        counts = {part: len(list((data / "leftImg8bit" / part).glob("*/*.png"))) for part in ("train", "val")}
        whitening = (("update_every", settings.nd_update_every),)
        return compared(workspace, settings, data, options, whitening, images=counts)


def present(result: Mapping[str, Any]) -> Presentation:
    """What came out."""
    used = result["settings"]
    note = (
        f"{result['images']['train']} training and {result['images']['val']} validation images, data: {used['data']}; "
        f"{used['network']} from random weights; network deconvolution computes its roots at every "
        f"{_nth(used['nd_update_every'])}step; recipe {used['recipe']} (SGD with momentum 0.9, weight decay 1e-4, poly "
        f"schedule) with batches of {used['batch_size']}, squares of {used['image_size']} pixels, {used['epochs']} "
        "epochs. mIoU: mean over those of the 19 classes that occur or are predicted, void ignored. "
        f"{CITYSCAPES_NOTE}"
    )
    return present_compared(result, _MEASURE, note=note, name="cityscapes")


def _nth(count: int) -> str:
    return "" if count == 1 else f"{count}th "


EXPERIMENT = Experiment(
    name="cityscapes",
    claim="Network deconvolution segments streets better than batch normalisation does.",
    source="table 3",
    sizes={
        "smoke": CityscapesSettings(
            data=GENERATED, bn_rates=(0.02,), nd_rates=(0.1,), epochs=1, evaluate_every=1, batch_size=4,
            image_size=32, base_size=32,
        ),
        "small": CityscapesSettings(),
        "paper": CityscapesSettings(
            data=".", network="torchvision:fcn_resnet50", nd_rates=(0.1,), epochs=30, evaluate_every=1,
            image_size=480, base_size=520, workers=8,
        ),
    },
    run=run,
    present=present,
    code=("lab/experiments/cityscapes.py", "lab/experiments/by_recipe.py", *RECIPE_CODE),
)  # fmt: skip
