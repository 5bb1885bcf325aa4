"""A trained network to look into: trained once, kept, and shared by the experiments that want the same one."""

from __future__ import annotations

import dataclasses
import io
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from netdeconv.lab import norms
from netdeconv.lab.checkpoint import read_state_dict
from netdeconv.lab.data import create_data, first_images
from netdeconv.lab.experiments.experiment import LIBRARY, Workspace
from netdeconv.lab.options import check_fields, option
from netdeconv.lab.run_record import RunRecord
from netdeconv.lab.running import fit
from netdeconv.lab.schedules import Schedule
from netdeconv.lab.store import RunStore, code_fingerprint, write_whole
from netdeconv.lab.training.settings import Network, build_task

__all__ = ["CODE", "NORMS", "Trained", "TrainedSettings", "test_images", "trained", "training_line"]

NORMS = {norm: str(norms.NORMS[norm]) for norm in ("bn", "nd")}

CODE = ("lab/tasks.py", "lab/schedules.py", "lab/running.py", "lab/experiments/trained.py")

_MOMENTUM = 0.9


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
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A network in evaluation mode, and what it can do."""

    net: nn.Module
    accuracy: float


def trained(workspace: Workspace, settings: TrainedSettings, norm: str) -> Trained:
    """Train a network, or find it again: it is kept beside the experiments, in ``trained/``.

    Args:
        workspace: its folder's parent gets the networks, and it is told the time that the training took.
        settings: what to train.
        norm: one of :data:`NORMS`.
    """
    folder = workspace.folder.parent / "trained"
    rate = settings.bn_rate if norm == "bn" else settings.nd_rate
    fixed = {key: value for key, value in dataclasses.asdict(settings).items() if key in _TRAINING}
    code = code_fingerprint((*LIBRARY, *CODE))
    identity = {**fixed, "norm": norm, "rate": rate, **workspace.identity(code)}
    name = f"{settings.dataset}-{settings.network.replace(':', '-')}-{norm}-seed{settings.seed}"
    store = RunStore(folder)
    path = store.path(name, identity, "pt")
    data: Any = create_data(settings.dataset, batch_size=settings.batch_size, seed=settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        sgd = partial(torch.optim.SGD, lr=rate, momentum=_MOMENTUM, weight_decay=settings.weight_decay)
        network = Network(network=settings.network, width=settings.width, norm=norm)
        task = build_task(network, data, sgd, Schedule())
        kept = store.load(name, identity)
        if kept is None or not path.is_file():
            data.setup()
            record = RunRecord()
            steps = settings.epochs * len(data.train_dataloader())
            workspace.progress.start_run(f"{NORMS[norm]}, {settings.network}", steps)
            callbacks = [record, workspace.progress.callback()]
            fit(task, data, epochs=settings.epochs, callbacks=callbacks, device=workspace.device)
            buffer = io.BytesIO()
            torch.save(task.net.state_dict(), buffer)
            write_whole(path, buffer.getvalue())
            spent = sum(record.step_seconds)
            store.save(name, identity, {"accuracy": record.curves["test/accuracy"][-1], "seconds": spent})
            kept = store.load(name, identity)
            assert kept is not None
    task.net.load_state_dict(read_state_dict(path))
    workspace.seconds += kept["seconds"]
    return Trained(task.net.eval(), kept["accuracy"])


_TRAINING = ("dataset", "network", "width", "epochs", "batch_size", "weight_decay", "seed")


def test_images(settings: TrainedSettings) -> Tensor:
    """The first test images, as a network gets them."""
    data: Any = create_data(settings.dataset, batch_size=settings.batch_size)
    data.setup()
    return first_images(data.test_dataloader(), settings.images)


def training_line(used: Any) -> str:
    """How the networks were trained, in a sentence; ``used`` are the settings as JSON gives them back."""
    epochs = "1 epoch" if used["epochs"] == 1 else f"{used['epochs']} epochs"
    return (
        f"{used['network']} of width {used['width']:g} after {epochs} of {used['dataset']} (SGD, momentum "
        f"{_MOMENTUM:g}, weight decay {used['weight_decay']:g}, batches of {used['batch_size']}, cosine schedule from "
        f"{used['bn_rate']:g} for batch normalisation and {used['nd_rate']:g} for network deconvolution, seed "
        f"{used['seed']}), seen on {used['images']} test images in evaluation mode"
    )
