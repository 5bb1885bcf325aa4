"""What a user might take instead of network deconvolution: every method at its best of several rates, by accuracy
after the same steps, and after the same seconds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from netdeconv.lab.allocator import keep_freed_memory
from netdeconv.lab.benchmark import step
from netdeconv.lab.benchmark.settings import StepSettings
from netdeconv.lab.benchmark.timing import Timings
from netdeconv.lab.experiments.cifar import DEPTHWISE, network_and_width, network_text
from netdeconv.lab.experiments.comparison import tuned
from netdeconv.lab.experiments.experiment import Experiment
from netdeconv.lab.experiments.rivals_report import of_method, present
from netdeconv.lab.methods import Method
from netdeconv.lab.options import check_fields, option
from netdeconv.lab.train import CODE, Training, run_trainings
from netdeconv.lab.workspace import Workspace

__all__ = ["EXPERIMENT", "RivalsSettings"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RivalsSettings:
    """What is trained. There is no validation part: best means best on the test images, for all alike.

    Raises:
        ConfigError: a value out of range, no such network, no such method, or one of them twice, however written.
    """

    networks: tuple[str, ...] = option(
        ("resnet18@0.25", "vgg11@0.25", "mobilenet_v2@0.25"),
        "networks of the zoo, with the factor on their channels behind an @",
    )
    dataset: str = option("cifar10", "data set", choices=("cifar10", "cifar100", "digits"))
    methods: tuple[str, ...] = option(
        ("bn", "nd", "iternorm", "dbp", "swbn", "gn+ws", "none", "bn/adamw", "bn/muon"),
        "normalisations, behind a slash the optimiser, if it is not SGD; the others get the seconds of the first",
    )
    rates: tuple[float, ...] = option((0.1, 0.03, 0.01), "learning rates of SGD")
    adaptive_rates: tuple[float, ...] = option((0.003, 0.01, 0.001), "learning rates of AdamW and Muon")
    epochs: int = option(3, "passes over the training images")
    steps: int | None = option(None, "training steps in an epoch; all if not given", kind=int)
    seeds: int = option(2, "trainings at the best rate; every rate has one")
    batch_size: int = option(128, "images in a training batch")
    weight_decay: float = option(1e-3, "of SGD")
    rounds: int = option(32, "timed steps of each method, rounded up to whole refresh periods")

    def __post_init__(self) -> None:
        object.__setattr__(self, "networks", tuple(network_text(*network_and_width(one)) for one in self.networks))
        object.__setattr__(self, "methods", tuple(str(Method.named(one)) for one in self.methods))
        check_fields(self, may_be_zero=("weight_decay",))


def planned(settings: RivalsSettings) -> Iterator[Training]:
    """Every rate once: the first for all networks and methods before any of the next, as a long run may be stopped."""
    for number in range(max(len(settings.rates), len(settings.adaptive_rates))):
        for network in settings.networks:
            name, width = network_and_width(network)
            for method in map(Method.named, settings.methods):
                rates = settings.rates if method.optimizer == "sgd" else settings.adaptive_rates
                if number < len(rates):
                    yield Training(
                        dataset=settings.dataset,
                        network=name,
                        width=width,
                        norm=method.norm,
                        optimizer=method.optimizer,
                        rate=rates[number],
                        epochs=settings.epochs,
                        steps=settings.steps,
                        batch_size=settings.batch_size,
                        weight_decay=settings.weight_decay,
                        channels_last=name in DEPTHWISE,
                    )


def run(settings: RivalsSettings, workspace: Workspace) -> Mapping[str, Any]:
    """The times first, with nothing else going on; then every rate, more seeds of the best, and the same seconds."""
    first = list(planned(settings))
    workspace.progress.expect(len(settings.networks))
    times = {network: _times(settings, network, workspace) for network in settings.networks}
    runs = run_trainings(first, workspace, times=times)["runs"]
    best = [_best(first, runs, network, method) for network in settings.networks for method in settings.methods]
    more = [dataclasses.replace(one, seed=seed) for seed in range(1, settings.seeds) for one in best]
    runs = run_trainings(more, workspace, before=runs, times=times)["runs"]
    steps = runs[0]["steps"] // settings.epochs
    slower = [
        _in_same_seconds(dataclasses.replace(one, seed=seed), steps, times)
        for seed in range(settings.seeds)
        for one in best
        if str(Method(one.norm, one.optimizer)) != settings.methods[0]
    ]
    return run_trainings(slower, workspace, before=runs, mark={"same_seconds": True}, times=times)


def _best(first: list[Training], runs: list[dict[str, Any]], network: str, method: str) -> Training:
    """The first training of a method at its best rate."""
    case = (*network_and_width(network), Method.named(method))
    place = (*case[:2], *case[2], tuned(of_method(runs, *case))[0]["rate"])
    return next(one for one in first if (one.network, one.width, one.norm, one.optimizer, one.rate) == place)


def _times(settings: RivalsSettings, network: str, workspace: Workspace) -> dict[str, Any]:
    """Seconds of a training step of every method, taken in turn, and their ratio to the first one's."""
    name, width = network_and_width(network)
    timed = StepSettings(
        network=name,
        width=width,
        classes=100 if settings.dataset == "cifar100" else 10,
        batch=settings.batch_size,
        against=",".join(settings.methods),
        rounds=settings.rounds,
        eval_rounds=1,
        warmup=1 if settings.rounds < 16 else 3,
        no_memory=True,
        channels_last=name in DEPTHWISE,
        device=workspace.device,
        threads=torch.get_num_threads(),
    )

    def compute() -> dict[str, Any]:
        result: dict[str, Any] = {}
        keep_freed_memory()  # as the trainings do
        step.run(timed, workspace.progress, result)
        found = result["training"]
        periods = {kind: one["period"] for kind, one in found["candidates"].items()}
        timings = Timings(tuple(found["plan"]), periods, found["seconds"])
        return {
            "seconds": {kind: one["step"] for kind, one in found["candidates"].items()},
            "ratios": {kind: timings.ratio(kind, settings.methods[0]) for kind in settings.methods},
        }

    return workspace.part(f"times-{network}", dataclasses.asdict(timed), compute)


def _in_same_seconds(training: Training, steps: int, times: Mapping[str, Any]) -> Training:
    """With as many epochs and steps as take the first method's time; the rate falls to zero within them."""
    method = str(Method(training.norm, training.optimizer))
    ratio = times[network_text(training.network, training.width)]["ratios"][method]["value"]
    total = max(1, round(training.epochs * steps / ratio))
    epochs = math.ceil(total / steps)
    return dataclasses.replace(training, epochs=epochs, steps=max(1, round(total / epochs)))


EXPERIMENT = Experiment(
    name="rivals",
    claim="Network deconvolution is ahead of what else could be taken, after the same steps and the same seconds.",
    source="not in the paper",
    sizes={
        "smoke": RivalsSettings(
            networks=("vgg11@0.0625",),
            dataset="digits",
            methods=("bn", "nd", "iternorm", "dbp", "bn/muon"),
            rates=(0.03,),
            adaptive_rates=(0.003,),
            epochs=1,
            steps=3,
            seeds=1,
            batch_size=32,
            rounds=1,
        ),
        "small": RivalsSettings(),
        "paper": RivalsSettings(networks=("resnet18", "vgg11", "mobilenet_v2"), epochs=20),
    },
    run=run,
    present=present,
    code=(
        "lab/experiments/rivals.py", "lab/experiments/cifar.py", "lab/methods.py", "lab/benchmark/step.py",
        "lab/benchmark/candidates.py", "lab/benchmark/timing.py", "lab/allocator.py", *CODE,
    ),
)  # fmt: skip
