"""A trained network to look into: trained once, kept, and shared by the experiments that want the same one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from netdeconv.lab.checkpoint import read_state_dict
from netdeconv.lab.data import first_images
from netdeconv.lab.experiments.experiment import LIBRARY
from netdeconv.lab.options import check_fields, option
from netdeconv.lab.train import CODE as TRAINING
from netdeconv.lab.train import DataSets, Training, make_network, train
from netdeconv.lab.workspace import Workspace

__all__ = ["CODE", "Trained", "TrainedSettings", "trained", "training_line"]

CODE = (*TRAINING, "lab/experiments/trained.py")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedSettings:
    """Which network is trained, on what, and how."""

    dataset: str = option("cifar10", "data set", choices=("digits", "mnist", "fashion_mnist", "cifar10", "cifar100"))
    network: str = option("vgg11", "small, a network of the zoo, or torchvision:NAME")
    width: float = option(0.25, "factor on the channels")
    epochs: int = option(1, "passes over the training images")
    batch_size: int = option(128, "images in a training batch")
    weight_decay: float = option(1e-3, "of SGD")
    bn_rate: float = option(0.02, "learning rate of batch normalisation")
    nd_rate: float = option(0.1, "learning rate of network deconvolution")
    seed: int = option(0, "of weights and order of the images")
    images: int = option(512, "test images to look at")

    def __post_init__(self) -> None:
        check_fields(self, may_be_zero=("seed", "weight_decay"))


@dataclasses.dataclass(frozen=True)
class Trained:
    """A network that was trained.

    Args:
        accuracy: on the test images.
        look: gives the network in evaluation mode, and the first test images as it gets them.
    """

    accuracy: float
    look: Callable[[], tuple[nn.Module, Tensor]]


def trained(workspace: Workspace, settings: TrainedSettings, norm: str) -> Trained:
    """Train a network, or find it again: it is kept beside the experiments, in ``trained/``.

    Args:
        workspace: its folder's parent gets the networks, and its time counts the training.
        settings: what to train.
        norm: one of :data:`~netdeconv.lab.experiments.comparison.METHODS`.
    """
    training = Training(
        dataset=settings.dataset,
        network=settings.network,
        norm=norm,
        rate=settings.bn_rate if norm == "bn" else settings.nd_rate,
        seed=settings.seed,
        width=settings.width,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        weight_decay=settings.weight_decay,
    )
    about = training.settings()
    folder, code = workspace.folder.parent / "trained", (*LIBRARY, *CODE)
    shared = Workspace(folder, code=code, progress=workspace.progress, device=workspace.device)
    data, weights = DataSets(), shared.path(training.name, about, "pt")

    def compute() -> dict[str, Any]:
        return dataclasses.asdict(train(training, shared, data, weights=weights))

    record = shared.part(training.name, about, compute, beside=weights)
    workspace.seconds += shared.seconds

    def look() -> tuple[nn.Module, Tensor]:
        images = data.of(training)
        with torch.random.fork_rng(devices=[]):
            net = make_network(training, images)
        net.load_state_dict(read_state_dict(weights))
        return net.eval(), first_images(images.test_dataloader(), settings.images)

    return Trained(record["curves"]["test/accuracy"][-1], look)


def training_line(used: Any) -> str:
    """How the networks were trained, in a sentence; ``used`` are the settings as JSON gives them back."""
    epochs = "1 epoch" if used["epochs"] == 1 else f"{used['epochs']} epochs"
    return (
        f"{used['network']} of width {used['width']:g} after {epochs} of {used['dataset']} (SGD, momentum "
        f"0.9, weight decay {used['weight_decay']:g}, batches of {used['batch_size']}, cosine "
        f"schedule from {used['bn_rate']:g} for batch normalisation and {used['nd_rate']:g} for network deconvolution, "
        f"seed {used['seed']}), seen on {used['images']} test images in evaluation mode"
    )
