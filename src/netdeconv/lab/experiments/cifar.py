"""Table 1 of the paper: networks on CIFAR with batch normalisation at its best of several rates, and with network
deconvolution at one rate for all of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from netdeconv import ConfigError
from netdeconv.lab.experiments.cifar_report import PAPER_RATE, present
from netdeconv.lab.experiments.experiment import Experiment
from netdeconv.lab.networks import network_names
from netdeconv.lab.norms import NORMS
from netdeconv.lab.optimizers import OPTIMIZERS
from netdeconv.lab.options import check_fields, option
from netdeconv.lab.train import CODE, Training, run_trainings
from netdeconv.lab.workspace import Workspace

__all__ = ["DEPTHWISE", "EXPERIMENT", "CifarSettings", "network_and_width", "network_text"]

# The paper's ten networks, with the factor on their channels at which two cores can train them.
_WIDTHS = {
    "vgg16": 0.25, "resnet18": 0.25, "preact_resnet18": 0.25, "densenet121": 0.125, "resnext29_32x4d": 0.25,
    "mobilenet_v2": 0.25, "dpn92": 0.125, "pnasnet_a": 0.25, "senet18": 0.25, "efficientnet_b0": 0.25,
}  # fmt: skip

# Networks with depthwise convolutions, which on a CPU take half the time with the channels last.
DEPTHWISE = ("mobilenet_v2", "pnasnet_a", "efficientnet_b0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CifarSettings:
    """What is trained. There is no validation part, as in the paper's code: best means best on the test images.

    Raises:
        ConfigError: a value out of range, no such network, or one network twice, however its width is written.
    """

    networks: tuple[str, ...] = option(
        tuple(f"{name}@{width:g}" for name, width in _WIDTHS.items()),
        "networks of the zoo, with the factor on their channels behind an @",
    )
    datasets: tuple[str, ...] = option(("cifar10",), "data sets", choices=("cifar10", "cifar100", "digits"))
    epochs: tuple[int, ...] = option((1,), "passes over the training images, a training for each")
    norms: tuple[str, ...] = option(("bn", "nd"), "normalisations to compare", choices=tuple(NORMS))
    bn_rates: tuple[float, ...] = option((PAPER_RATE, 0.03, 0.01), "learning rates of batch normalisation")
    rates: tuple[float, ...] = option((PAPER_RATE, 0.03), "learning rates of the others")
    seeds: int = option(2, "trainings at every rate")
    batch_size: int = option(128, "images in a training batch")
    weight_decay: float = option(1e-3, "of SGD")
    optimizer: str = option(
        "sgd", "of batch normalisation, whose rates are then others; the rest has SGD", choices=tuple(OPTIMIZERS)
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "networks", tuple(network_text(*network_and_width(one)) for one in self.networks))
        check_fields(self, may_be_zero=("weight_decay",))


def network_and_width(text: str) -> tuple[str, float]:
    """``"vgg11@0.25"`` as a name and the factor on the channels.

    Raises:
        ConfigError: no such network, or no such factor.
    """
    name, _, width = text.partition("@")
    known = network_names()
    if name not in known:
        raise ConfigError(f"expected networks out of {', '.join(known[:16])}, got {name!r}")
    if width and not _is_factor(width):
        raise ConfigError(f"expected a factor on the channels behind the @ of {text!r}, above 0 and up to 4")
    return name, float(width or 1)


def network_text(name: str, width: float) -> str:
    """The text that :func:`network_and_width` reads, always the same for one network: ``"vgg11@0.25"``, ``"vgg11"``."""
    return name if width == 1 else f"{name}@{width:.15g}"


def _is_factor(text: str) -> bool:
    try:
        return 0 < float(text) <= 4
    except ValueError:
        return False


def planned(settings: CifarSettings) -> Iterator[Training]:
    """All networks at one rate before any at the next, all rates before the next seed: a long run may be stopped."""
    order = itertools.product(
        sorted(settings.epochs), range(settings.seeds), range(max(len(settings.bn_rates), len(settings.rates)))
    )
    for epochs, seed, number in order:
        for dataset, network, norm in itertools.product(settings.datasets, settings.networks, settings.norms):
            rates = settings.bn_rates if norm == "bn" else settings.rates
            if number < len(rates):
                name, width = network_and_width(network)
                yield Training(
                    dataset=dataset,
                    network=name,
                    width=width,
                    norm=norm,
                    rate=rates[number],
                    seed=seed,
                    epochs=epochs,
                    batch_size=settings.batch_size,
                    weight_decay=settings.weight_decay,
                    channels_last=name in DEPTHWISE,
                    optimizer=settings.optimizer if norm == "bn" else "sgd",
                )


def run(settings: CifarSettings, workspace: Workspace) -> Mapping[str, Any]:
    """Train what is not finished yet."""
    return run_trainings(planned(settings), workspace)


EXPERIMENT = Experiment(
    name="cifar",
    claim="Replacing batch normalisation by network deconvolution gives faster convergence and better accuracy.",
    source="abstract, table 1",
    sizes={
        "smoke": CifarSettings(
            networks=("vgg11@0.0625",),
            datasets=("digits",),
            bn_rates=(PAPER_RATE, 0.02),
            rates=(PAPER_RATE,),
            seeds=1,
            batch_size=64,
        ),
        "small": CifarSettings(),
        "paper": CifarSettings(
            networks=tuple(_WIDTHS),
            datasets=("cifar10", "cifar100"),
            epochs=(1, 20, 100),
            norms=("bn", "nd", "nd-authors"),
            seeds=3,
        ),
    },
    run=run,
    present=present,
    code=("lab/experiments/cifar.py", *CODE),
)
