"""Table 1 of the paper: networks on CIFAR with batch normalisation, at the paper's rate and at its own best, and with
network deconvolution."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from netdeconv import ConfigError
from netdeconv.lab.experiments.cifar_report import PAPER_RATE, present
from netdeconv.lab.experiments.experiment import Experiment, Workspace
from netdeconv.lab.experiments.trials import CODE, DataSets, Trial, best_rate, run_trials
from netdeconv.lab.networks import network_names
from netdeconv.lab.norms import NORMS
from netdeconv.lab.options import check_fields, option

__all__ = ["EXPERIMENT", "CifarSettings"]

# Networks with depthwise convolutions, which on a CPU take half the time with the channels last.
_DEPTHWISE = ("mobilenet_v2", "pnasnet_a", "efficientnet_b0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CifarSettings:
    """What is trained. There is no validation part, as in the paper's code: best means best on the test images.

    Raises:
        ConfigError: a value out of range, or no such network.
    """

    networks: tuple[str, ...] = option(
        ("vgg16@0.125", "resnet18@0.0625", "preact_resnet18@0.0625", "mobilenet_v2@0.125", "pnasnet_a@0.125"),
        "networks of the zoo, with the factor on their channels behind an @",
    )
    datasets: tuple[str, ...] = option(("cifar10",), "data sets", choices=("cifar10", "cifar100", "digits"))
    epochs: tuple[int, ...] = option((1,), "passes over the training images, a training for each")
    norms: tuple[str, ...] = option(("bn", "nd"), "normalisations to compare", choices=tuple(NORMS))
    bn_rates: tuple[float, ...] = option((PAPER_RATE, 0.02, 0.05, 0.01), "learning rates of batch normalisation")
    rates: tuple[float, ...] = option((PAPER_RATE,), "learning rates of the others")
    seeds: int = option(1, "seeds at the paper's rate and at the best one; the other rates get one")
    batch_size: int = option(128, "images in a training batch")
    weight_decay: float = option(1e-3, "of SGD")

    def __post_init__(self) -> None:
        check_fields(self)
        known = network_names()
        for one in self.networks:
            name, _, width = one.partition("@")
            if name not in known:
                raise ConfigError(f"expected networks out of {', '.join(known[:16])}, got {name!r}")
            if width and not _is_factor(width):
                raise ConfigError(f"expected a factor on the channels behind the @ of {one!r}, above 0 and up to 4")


def _is_factor(text: str) -> bool:
    try:
        return 0 < float(text) <= 4
    except ValueError:
        return False


def _trial(
    settings: CifarSettings, dataset: str, network: str, epochs: int, norm: str, rate: float, seed: int
) -> Trial:
    name, _, width = network.partition("@")
    return Trial(
        dataset=dataset,
        network=name,
        width=float(width or 1),
        norm=norm,
        rate=rate,
        seed=seed,
        epochs=epochs,
        batch_size=settings.batch_size,
        weight_decay=settings.weight_decay,
        channels_last=name in _DEPTHWISE,
    )


def first_trials(settings: CifarSettings) -> Iterator[Trial]:
    """One seed at every rate; all networks at the first rates before any at the next, as a long run may be stopped."""
    most = max(len(settings.bn_rates), len(settings.rates))
    for epochs in sorted(settings.epochs):
        for number in range(most):
            for dataset in settings.datasets:
                for network in settings.networks:
                    for norm in settings.norms:
                        rates = settings.bn_rates if norm == "bn" else settings.rates
                        if number < len(rates):
                            yield _trial(settings, dataset, network, epochs, norm, rates[number], 0)


def more_trials(settings: CifarSettings, found: list[dict[str, Any]]) -> Iterator[Trial]:
    """The other seeds, at the paper's rate and at the best one."""
    for seed in range(1, settings.seeds):
        for epochs in sorted(settings.epochs):
            for dataset in settings.datasets:
                for network in settings.networks:
                    for norm in settings.norms:
                        rates = settings.bn_rates if norm == "bn" else settings.rates
                        like = _trial(settings, dataset, network, epochs, norm, rates[0], 0)
                        same = [one for one in found if one["seed"] == 0 and _alike(one, like)]
                        paper = [PAPER_RATE] if PAPER_RATE in rates else []
                        for rate in dict.fromkeys([*paper, best_rate(same)]):
                            yield _trial(settings, dataset, network, epochs, norm, rate, seed)


def _alike(entry: Mapping[str, Any], trial: Trial) -> bool:
    return all(entry[key] == getattr(trial, key) for key in ("dataset", "network", "width", "norm", "epochs"))


def run(settings: CifarSettings, workspace: Workspace) -> Mapping[str, Any]:
    """Train what is not finished yet."""
    plan = list(first_trials(settings))
    count = len(settings.networks) * len(settings.norms) * len(settings.datasets) * len(settings.epochs)
    workspace.progress.expect(len(plan) + math.ceil(1.5 * count) * (settings.seeds - 1))
    data = DataSets()
    found = run_trials(plan, workspace, data)
    return {"runs": found + run_trials(more_trials(settings, found), workspace, data, before=found)}


EXPERIMENT = Experiment(
    name="cifar",
    claim="Replacing batch normalisation by network deconvolution gives faster convergence and better accuracy.",
    source="abstract, table 1",
    sizes={
        "smoke": CifarSettings(
            networks=("vgg11@0.0625",), datasets=("digits",), bn_rates=(PAPER_RATE, 0.02), batch_size=64
        ),
        "small": CifarSettings(),
        "paper": CifarSettings(
            networks=(
                "vgg16", "resnet18", "preact_resnet18", "densenet121", "resnext29_32x4d", "mobilenet_v2", "dpn92",
                "pnasnet_a", "senet18", "efficientnet_b0",
            ),
            datasets=("cifar10", "cifar100"),
            epochs=(1, 20, 100),
            norms=("bn", "nd", "nd-authors"),
            seeds=3,
        ),
    },
    run=run,
    present=present,
    code=("lab/experiments/cifar.py", *CODE),
)  # fmt: skip
