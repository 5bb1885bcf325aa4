"""The demo: one small network on digits, with batch normalisation and with network deconvolution."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch

from netdeconv.lab import norms
from netdeconv.lab.data import DigitsData
from netdeconv.lab.experiments import demo_report
from netdeconv.lab.experiments.demo_settings import DemoSettings
from netdeconv.lab.networks import NORMS, SmallConvNet
from netdeconv.lab.progress import Progress, quiet_lightning
from netdeconv.lab.run_record import RunRecord
from netdeconv.lab.running import fit, threads
from netdeconv.lab.store import RunStore, code_fingerprint, versions
from netdeconv.lab.tasks import Classification

__all__ = ["run_demo"]

NAMES = {norm: str(norms.NORMS[norm]) for norm in NORMS}

# What a run's numbers depend on; everything else may change without repeating it.
_CODE = (
    "config.py",
    "functional",
    "nn",
    "lab/data",
    "lab/networks.py",
    "lab/run_record.py",
    "lab/running.py",
    "lab/schedules.py",
    "lab/tasks.py",
    "lab/experiments/demo.py",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: which method, learning rate and seed."""

    norm: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.norm}-rate{self.rate:g}-seed{self.seed}"

    def identity(self, settings: DemoSettings, code: str) -> dict[str, Any]:
        """Everything that this run's numbers depend on; ``code`` is a fingerprint of the source."""
        shared = dataclasses.asdict(settings)
        for name in ("seeds", "rates", "target"):
            del shared[name]
        return {**dataclasses.asdict(self), **shared, "torch": torch.__version__, "code": code}


def run_demo(out: Path, settings: DemoSettings, *, fresh: bool = False, show: bool = True) -> dict[str, Any]:
    """Train what is not finished yet, and write numbers, pictures and the page.

    Args:
        out: run folder; finished runs are kept in ``out/runs`` and used again when nothing they depend on
            has changed.
        settings: what to do.
        fresh: repeat finished runs.
        show: progress on standard error.

    Returns:
        What is in ``metrics.json``.
    """
    store, code = RunStore(out / "runs"), code_fingerprint(_CODE)
    # The methods take turns, so that whatever else slows the machine down slows both.
    plan = [
        Run(norm, rate, seed) for rate in settings.rates for seed in range(settings.seeds) for norm in NORMS
    ]  # fmt: skip
    results: dict[Run, dict[str, Any]] = {}
    for run in plan:
        found = None if fresh else store.load(run.name, run.identity(settings, code))
        if found is not None:
            results[run] = found
    with threads(settings.threads), quiet_lightning(), Progress(len(plan), len(results), show=show) as progress:
        if results:
            progress.say(f"{len(results)} of {len(plan)} runs were finished before")
        for run in plan:
            if run not in results:
                results[run] = _train(run, settings, progress)
                store.save(run.name, run.identity(settings, code), results[run])
                progress.end_run()
                if run == [r for r in plan if r.rate == run.rate][-1]:
                    progress.say(_rate_line(run.rate, settings, results))
        progress.say("drawing pictures")
        return demo_report.write(out, settings, NAMES, results, versions())


def _train(run: Run, settings: DemoSettings, progress: Progress) -> dict[str, Any]:
    """One run, from its own seed, whatever the global generator's state."""
    data = DigitsData(batch_size=settings.batch_size, seed=run.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        net = SmallConvNet(run.norm, in_channels=data.in_channels, num_classes=data.num_classes, width=settings.width)
        sgd = partial(torch.optim.SGD, lr=run.rate, momentum=settings.momentum, weight_decay=settings.weight_decay)
        task = Classification(net, classes=data.num_classes, optimizer=sgd)
        data.setup()
        record = RunRecord(data.parts["train"][0], data.parts["test"])
        progress.start_run(
            f"{NAMES[run.norm]}, rate {run.rate:g}, seed {run.seed}", settings.epochs * len(data.train_dataloader())
        )
        fit(task, data, epochs=settings.epochs, callbacks=[record, progress.callback()])
    seconds = record.step_seconds
    late = seconds[len(seconds) // 2 :]
    return {
        "curves": record.curves,
        "fresh_accuracy": record.fresh_accuracy,
        "steps": len(seconds),
        "seconds_per_step": sum(seconds) / len(seconds),
        "seconds_per_late_step": sum(late) / len(late),
        "diverged": not all(map(math.isfinite, record.curves["train/loss"])),
        "parameters": sum(p.numel() for p in net.parameters()),
    }


def _rate_line(rate: float, settings: DemoSettings, results: dict[Run, dict[str, Any]]) -> str:
    parts = []
    for norm in NORMS:
        last = [results[Run(norm, rate, s)]["curves"]["validation/accuracy"][-1] for s in range(settings.seeds)]
        parts.append(f"{NAMES[norm]} {100 * sum(last) / len(last):.1f} %")
    return f"learning rate {rate:g}: validation accuracy {', '.join(parts)}"
