"""CIFAR-10: the same network with batch normalisation, network deconvolution, and the published procedure."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from netdeconv import ConfigError, zoo
from netdeconv.lab.data import CIFAR10Data, data_root
from netdeconv.lab.experiments.cifar_settings import METHODS, CifarSettings
from netdeconv.lab.norms import with_norm
from netdeconv.lab.progress import Progress, quiet_lightning
from netdeconv.lab.run_record import RunRecord
from netdeconv.lab.running import fit, threads
from netdeconv.lab.store import RunStore, code_fingerprint, versions, write_json
from netdeconv.lab.tasks import Classification

__all__ = ["run_cifar", "table"]

_CODE = (
    "config.py",
    "functional",
    "nn",
    "zoo",
    "surgery",
    "lab/data",
    "lab/norms.py",
    "lab/run_record.py",
    "lab/running.py",
    "lab/schedules.py",
    "lab/tasks.py",
    "lab/experiments/cifar.py",
)

_MOMENTUM = 0.9


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: which method, learning rate and seed."""

    method: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-rate{self.rate:g}-seed{self.seed}"


def run_cifar(out: Path, settings: CifarSettings, *, show: bool = True) -> list[dict[str, Any]]:
    """Train what is not finished yet.

    Several processes may share ``out``, each with other methods, rates or seeds: finished runs are kept there, one
    file each, and are not repeated while settings and code are the same.

    Returns:
        One entry for every run in ``settings``: method, rate, seed, and the numbers of the run.

    Raises:
        ConfigError: no data.
    """
    store, code = RunStore(out / "runs"), code_fingerprint(_CODE)
    shared = {name: getattr(settings, name) for name in ("network", "width", "epochs", "batch_size", "weight_decay")}
    identity = {**shared, "torch": torch.__version__, "code": code}
    plan = [Run(*one) for one in itertools.product(settings.methods, settings.rates, range(settings.seeds))]
    entries = []
    data: CIFAR10Data | None = None
    found = {run: store.load(run.name, {**identity, **dataclasses.asdict(run)}) for run in plan}
    done = sum(result is not None for result in found.values())
    with threads(settings.threads), quiet_lightning(), Progress(len(plan), done, show=show) as progress:
        for run in plan:
            result = found[run]
            if result is None:
                if data is None:
                    data = CIFAR10Data(root=data_root(), batch_size=settings.batch_size)
                    data.setup()
                result = _train(run, settings, data, progress)
                store.save(run.name, {**identity, **dataclasses.asdict(run)}, result)
                progress.end_run()
            entries.append({**dataclasses.asdict(run), **result})
            progress.say(_line(entries[-1]))
    write_json(out / "cifar.json", {"settings": settings.as_dict(), "versions": versions(), "runs": entries})
    return entries


def network(method: str, settings: CifarSettings) -> nn.Module:
    """The network for a method: as it is, converted, or converted by the published procedure.

    Raises:
        ConfigError: no such network.
    """
    try:
        net = zoo.create(settings.network, num_classes=CIFAR10Data.num_classes, width=settings.width)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return with_norm(net, "nd-paper" if method == "paper" else method)


def _train(run: Run, settings: CifarSettings, data: CIFAR10Data, progress: Progress) -> dict[str, Any]:
    data.seed = run.seed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        net = network(run.method, settings)
        sgd = partial(torch.optim.SGD, lr=run.rate, momentum=_MOMENTUM, weight_decay=settings.weight_decay)
        task = Classification(net, classes=data.num_classes, optimizer=sgd, parts=("test",))
        record = RunRecord()
        progress.start_run(run.name, settings.epochs * len(data.train_dataloader()))
        fit(task, data, epochs=settings.epochs, callbacks=[record, progress.callback()])
    seconds = record.step_seconds
    return {
        "curves": record.curves,
        "steps": len(seconds),
        "seconds_per_step": sum(seconds) / len(seconds),
        "diverged": not all(map(math.isfinite, record.curves["train/loss"])),
    }


def _line(entry: dict[str, Any]) -> str:
    accuracy = entry["curves"]["test/accuracy"][-1]
    return (
        f"{METHODS[entry['method']]}, rate {entry['rate']:g}, seed {entry['seed']}: "
        f"test accuracy {100 * accuracy:.2f} %, "
        f"{entry['seconds_per_step']:.3f} s per step"
    )


def table(entries: Iterable[dict[str, Any]]) -> str:
    """Test accuracy after the last epoch, mean and deviation over the seeds, as a Markdown table."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault((entry["method"], entry["rate"]), []).append(entry)
    lines = [
        "| method | rate | seeds | test accuracy | train loss | s per step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (method, rate), runs in groups.items():
        last = [100 * run["curves"]["test/accuracy"][-1] for run in runs]
        loss = statistics.mean(run["curves"]["train/loss"][-1] for run in runs)
        seconds = statistics.mean(run["seconds_per_step"] for run in runs)
        spread = f" ± {statistics.stdev(last):.2f}" if len(last) > 1 else ""
        lines.append(
            f"| {METHODS[method]} | {rate:g} | {len(runs)} | {statistics.mean(last):.2f}{spread} % "
            f"| {loss:.3f} | {seconds:.3f} |"
        )
    return "\n".join(lines)
