"""Numbers that others have published, as data, each with its source."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

__all__ = ["CIFAR", "CITYSCAPES_NOTE", "COST", "IMAGENET", "PARAMETERS", "Pair", "cifar"]

PAPER = "Ye et al., Network Deconvolution, ICLR 2020, arXiv 1905.11926"
STUDY = "the public reproduction study of the paper (V100, 16 GB)"


@dataclasses.dataclass(frozen=True)
class Pair:
    """A number with batch normalisation and one with network deconvolution."""

    bn: float
    nd: float


EPOCHS = (1, 20, 100)

# Table 1 of the paper: test accuracy in per cent, BN/ND after 1, 20 and 100 epochs; SGD, rate 0.1, momentum 0.9, weight
# decay 1e-3, batch 128, cosine per step. As printed; PNASNetA's 36.52 after 1 epoch of CIFAR-100 is also PreAct-18's.
_TABLE_1: Mapping[str, Mapping[str, tuple[str, str, str]]] = {
    "cifar10": {
        "vgg16": ("14.12/74.18", "90.07/93.25", "93.58/94.56"),
        "resnet18": ("56.25/72.89", "92.64/94.07", "94.87/95.40"),
        "preact_resnet18": ("55.15/72.70", "91.93/94.10", "94.37/95.44"),
        "densenet121": ("59.56/76.63", "93.25/94.89", "94.71/95.88"),
        "resnext29_32x4d": ("52.14/69.22", "93.12/94.05", "95.15/95.80"),
        "mobilenet_v2": ("54.29/65.40", "89.86/92.52", "90.51/94.35"),
        "dpn92": ("34.00/53.02", "92.87/93.74", "95.14/95.82"),
        "pnasnet_a": ("21.81/64.19", "75.85/81.97", "81.22/84.45"),
        "senet18": ("57.63/67.21", "92.37/94.11", "94.57/95.38"),
        "efficientnet_b0": ("35.40/55.67", "84.21/86.78", "86.07/88.42"),
    },
    "cifar100": {
        "vgg16": ("2.01/37.94", "63.22/71.97", "72.75/75.32"),
        "resnet18": ("16.10/35.73", "72.67/76.55", "77.70/78.63"),
        "preact_resnet18": ("15.17/36.52", "70.79/76.04", "76.14/79.14"),
        "densenet121": ("17.90/42.91", "74.79/77.63", "77.99/80.69"),
        "resnext29_32x4d": ("17.98/30.93", "74.26/77.35", "78.60/80.34"),
        "mobilenet_v2": ("15.88/29.01", "66.31/72.33", "67.52/74.90"),
        "dpn92": ("8.84/21.89", "74.87/76.12", "78.87/80.38"),
        "pnasnet_a": ("10.49/36.52", "44.60/55.65", "54.52/59.44"),
        "senet18": ("16.60/32.22", "71.10/75.79", "76.41/78.63"),
        "efficientnet_b0": ("19.03/22.40", "57.23/57.59", "59.09/62.37"),
    },
}

# Net Size of the same table, in millions of parameters.
PARAMETERS: Mapping[str, float] = {
    "vgg16": 14.71, "resnet18": 11.17, "preact_resnet18": 11.17, "densenet121": 6.88, "resnext29_32x4d": 4.76,
    "mobilenet_v2": 2.28, "dpn92": 34.18, "pnasnet_a": 0.13, "senet18": 11.26, "efficientnet_b0": 2.91,
}  # fmt: skip


def _pair(text: str) -> Pair:
    bn, nd = map(float, text.split("/"))
    return Pair(bn, nd)


CIFAR: Mapping[tuple[str, str, int], Pair] = {
    (dataset, network, epochs): _pair(text)
    for dataset, networks in _TABLE_1.items()
    for network, row in networks.items()
    for epochs, text in zip(EPOCHS, row, strict=True)
}
"""Table 1 of the paper by data set, network of the zoo and epochs: test accuracy in per cent."""


def cifar(dataset: str, network: str, epochs: int) -> Pair | None:
    """Test accuracy in per cent as published, where it was."""
    return CIFAR.get((dataset, network, epochs))


@dataclasses.dataclass(frozen=True)
class ImageNetRow:
    """Top-1 and top-5 accuracy on ImageNet in per cent, 90 epochs, batch 256: in the paper and in the study."""

    network: str
    norm: str
    paper: tuple[float, float]
    study: tuple[float, float]


# Table 2 of the paper. Of the BN rows the paper's are those of torchvision's weights, the study trained its own.
IMAGENET: tuple[ImageNetRow, ...] = (
    ImageNetRow("vgg11", "none", (69.02, 88.63), (69.61, 89.08)),
    ImageNetRow("vgg11", "bn", (70.38, 89.81), (71.35, 90.25)),
    ImageNetRow("vgg11", "nd", (71.95, 90.49), (71.95, 90.60)),
    ImageNetRow("resnet18", "bn", (69.76, 89.08), (70.72, 89.73)),
    ImageNetRow("resnet18", "nd", (71.24, 90.14), (71.58, 90.27)),
    ImageNetRow("densenet121", "bn", (74.65, 92.17), (75.88, 92.96)),
    ImageNetRow("densenet121", "nd", (75.73, 92.75), (75.67, 92.69)),
)

CITYSCAPES_NOTE = (
    "The authors' segmentation code trains void as a class and averages a class that never occurs into the mean IoU, "
    "so that its numbers are not those of the 19 classes."
)
"""Why Table 3 of the paper is not held beside a mean over 19 classes."""


@dataclasses.dataclass(frozen=True)
class CostRow:
    """How much longer a training takes with network deconvolution, measured by the study with the authors' code."""

    dataset: str
    network: str
    ratio: tuple[float, float]  # lowest and highest found
    remark: str = ""


COST: tuple[CostRow, ...] = (
    CostRow("cifar", "vgg16", (3.4, 3.4)),
    CostRow("cifar", "resnet18", (4.0, 5.5), "the study ran another ResNet-18, for ImageNet"),
    CostRow("cifar", "preact_resnet18", (3.7, 3.7)),
    CostRow("cifar", "densenet121", (4.2, 4.2)),
    CostRow("cifar", "resnext29_32x4d", (2.9, 2.9)),
    CostRow("cifar", "mobilenet_v2", (3.8, 3.8)),
    CostRow("cifar", "dpn92", (2.3, 2.3)),
    CostRow("cifar", "pnasnet_a", (4.4, 4.4)),
    CostRow("cifar", "senet18", (4.0, 4.0)),
    CostRow("cifar", "efficientnet_b0", (1.0, 1.0), "all but two layers keep batch normalisation, by a mistake"),
    CostRow("imagenet", "vgg11", (1.75, 1.75)),
    CostRow("imagenet", "resnet18", (2.7, 2.7)),
    CostRow("imagenet", "densenet121", (1.44, 1.44)),
)
"""Training time with network deconvolution over batch normalisation's, authors' code on a V100."""
