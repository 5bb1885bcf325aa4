"""Trainings by ``netdeconv fit`` itself, recipe and all, as parts of an experiment: both methods at several rates."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from netdeconv import ConfigError
from netdeconv.lab import norms
from netdeconv.lab.data import data_root
from netdeconv.lab.experiments.experiment import Workspace
from netdeconv.lab.running import accelerator
from netdeconv.lab.store import read_json

__all__ = ["CODE", "GENERATED", "NORMS", "Fit", "compared", "fitted", "folder_of"]

NORMS = {norm: str(norms.NORMS[norm]) for norm in ("bn", "nd")}
GENERATED = "generated"

# What the numbers of a training by the command fit depend on, besides the library.
CODE = ("lab/tasks.py", "lab/schedules.py", "lab/training", "lab/recipes", "lab/experiments/fitted.py")


@dataclasses.dataclass(frozen=True)
class Fit:
    """One training: which normalisation, learning rate and seed."""

    norm: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.norm}-rate{self.rate:g}-seed{self.seed}"


@contextlib.contextmanager
def folder_of(data: str, generate: Callable[[Path], None]) -> Any:
    """The folder with the data: generated for as long as it is needed, or one below that of all data sets.

    Args:
        data: ``"generated"``, or a folder, relative to the environment variable NETDECONV_DATA.
        generate: writes small data into a folder.

    Raises:
        ConfigError: there is no such folder.
    """
    if data != GENERATED:
        folder = data_root() / data
        if not folder.is_dir():
            raise ConfigError(f"expected data in {folder}, there is no such folder")
        yield folder
        return
    with tempfile.TemporaryDirectory() as made:
        generate(Path(made))
        yield Path(made)


def compared(
    workspace: Workspace,
    settings: Any,
    data: Path,
    arguments: Callable[[Path, str], Sequence[str]],
    **found: Any,
) -> dict[str, Any]:
    """Train every method at each of its rates with every seed; the result of an experiment.

    Args:
        workspace: keeps what is finished.
        settings: with ``bn_rates``, ``nd_rates``, ``seeds``.
        data: folder of the data.
        arguments: for ``netdeconv fit``, by folder of the data and norm; norm, rate, seed and run folder are added.
        found: what else the result has.
    """
    plan = [
        Fit(norm, rate, seed)
        for seed in range(settings.seeds)
        for norm in NORMS
        for rate in getattr(settings, f"{norm}_rates")
    ]
    workspace.progress.expect(len(plan))
    fixed = {key: value for key, value in dataclasses.asdict(settings).items() if key not in _PLAN}
    result: dict[str, Any] = {"settings": dataclasses.asdict(settings), **found, "runs": []}
    for fit in plan:
        given = [*arguments(data, fit.norm), "--norm", fit.norm, "--optimizer.lr", f"{fit.rate:g}"]
        given += ["--seed_everything", str(fit.seed), "--trainer.accelerator", accelerator(workspace.device)]
        given += ["--trainer.devices", "1"] if workspace.device == "cuda" else []
        identity = {**fixed, **dataclasses.asdict(fit)}
        part = workspace.part(fit.name, identity, functools.partial(fitted, workspace, fit, given))
        result["runs"].append({**dataclasses.asdict(fit), **part})
        workspace.publish(result)
    return result


_PLAN = ("bn_rates", "nd_rates", "seeds")  # which trainings there are, and nothing about any of them


def fitted(workspace: Workspace, fit: Fit, arguments: Sequence[str]) -> dict[str, Any]:
    """Run ``netdeconv fit``; what it has logged, by epoch. A training that was stopped goes on.

    Raises:
        KeyboardInterrupt: stopped.
    """
    from netdeconv.lab.fit_command import DIVERGED, run

    settled = [word for word in arguments if not word.startswith(tempfile.gettempdir())]
    about = hashlib.sha256(json.dumps([*settled, workspace.code]).encode()).hexdigest()[:8]
    folder = workspace.folder / "fits" / f"{fit.name}-{about}"
    with open(os.devnull, "w") as nowhere:
        told = sys.stderr if workspace.progress.show else nowhere
        with contextlib.redirect_stdout(told):
            code = run("fit", [*arguments, "--out", str(folder), "--trainer.enable_progress_bar", "false"], quiet=True)
    if code not in (0, DIVERGED):  # a rate that is too high is a result as well
        raise KeyboardInterrupt
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    about_run: Mapping[str, Any] = read_json(folder / "run.json") or {}
    return {"epochs": rows, "parameters": about_run.get("parameters")}
