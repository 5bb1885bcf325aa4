"""What the experiments that train by a recipe of ``netdeconv fit`` have in common: plan, table and curves."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netdeconv import ConfigError
from netdeconv.lab.data import data_root
from netdeconv.lab.experiments.comparison import (
    METHODS,
    accuracy_cell,
    at_epochs,
    by_rate,
    grouped,
    line,
    loss_cell,
)
from netdeconv.lab.experiments.experiment import Picture, Presentation
from netdeconv.lab.report import Table
from netdeconv.lab.train import Training, run_trainings
from netdeconv.lab.workspace import Workspace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GENERATED", "Measure", "compared", "folder_of", "present_compared"]

GENERATED = "generated"


@contextlib.contextmanager
def folder_of(data: str, generate: Callable[[Path], None]) -> Iterator[Path]:
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
    root: Path,
    options: Sequence[str],
    whitening: tuple[tuple[str, Any], ...] = (),
    **about: Any,
) -> dict[str, Any]:
    """Train both norms at each of their rates with every seed; the result of an experiment.

    Args:
        workspace: keeps what is finished.
        settings: with ``data``, ``recipe``, ``network``, ``epochs``, ``batch_size``, ``bn_rates``, ``nd_rates``,
            ``seeds``.
        root: folder of the data.
        options: further ones for ``netdeconv fit``.
        whitening: settings of network deconvolution.
        about: what else the result has.
    """
    plan = [
        Training(
            dataset=settings.data,
            network=settings.network,
            norm=norm,
            rate=rate,
            seed=seed,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            whitening=whitening if norm == "nd" else (),
            recipe=settings.recipe,
            options=tuple(options),
            root=root,
        )
        for seed, norm in itertools.product(range(settings.seeds), METHODS)
        for rate in getattr(settings, f"{norm}_rates")
    ]
    return run_trainings(plan, workspace, settings=dataclasses.asdict(settings), **about)


@dataclasses.dataclass(frozen=True)
class Measure:
    """What is compared: a share of 1, the larger the better."""

    logged: str
    title: str


def present_compared(
    result: Mapping[str, Any], measure: Measure, *, note: str, name: str, published: Sequence[Table] = ()
) -> Presentation:
    """A row for every method and rate, and the curves.

    Args:
        result: of :func:`compared`.
        measure: what to compare.
        note: how the numbers came about.
        name: of the picture's file.
        published: tables to show beside.
    """
    runs = grouped(map(_with_curves, result["runs"]), lambda run: run["norm"])
    caption = f"Training loss and {measure.title} by epoch, mean over the seeds, from the worst to the best of them."
    figure = Picture(f"{name}-curves", caption, lambda figure: _draw(figure, runs, measure))
    return Presentation([_table(runs, measure, note), *published], [figure])


def _with_curves(run: Mapping[str, Any]) -> Mapping[str, Any]:
    """A run; those of version 0.1 have a row for every epoch in the place of curves."""
    if "curves" in run:
        return run
    names = [name for name in run["epochs"][-1] if "/" in name]
    return {**run, "curves": {name: [row.get(name) for row in run["epochs"]] for name in names}}


def _table(runs: Mapping[str, Sequence[Mapping[str, Any]]], measure: Measure, note: str) -> Table:
    part = measure.logged.partition("/")[0]
    logged = next(run["curves"] for same in runs.values() for run in same)
    others = sorted(key for key in logged if key.startswith(f"{part}/") and key not in (measure.logged, f"{part}/loss"))
    rows = [
        [
            METHODS[norm],
            f"{rate:g}",
            str(len(same)),
            *(accuracy_cell(same, key) for key in (measure.logged, *others)),
            *(loss_cell(same, key) for key in (f"{part}/loss", "train/loss")),
        ]
        for norm in runs
        for rate, same in by_rate(runs[norm]).items()
    ]
    names = [key.partition("/")[2].replace("_", " ") for key in others]
    columns = ["method", "rate", "seeds", measure.title, *names, f"{part} loss", "training loss"]
    return Table(columns, rows, title="After the last epoch", note=note)


def _draw(figure: Figure, runs: Mapping[str, Sequence[Mapping[str, Any]]], measure: Measure) -> None:
    from netdeconv.lab.plots import LINES, tidy

    figure.set_size_inches(9.5, 3.9)
    styles = itertools.cycle(LINES)
    panels = {"train/loss": "training loss", measure.logged: f"{measure.title} (%)"}
    grid = figure.subplots(1, len(panels))
    for norm in runs:
        for rate, same in by_rate(runs[norm]).items():
            style = next(styles)
            for axes, logged in zip(grid, panels, strict=True):
                line(axes, at_epochs(same, logged), f"{METHODS[norm]}, rate {rate:g}", style)
    for axes, label in zip(grid, panels.values(), strict=True):
        axes.set(xlabel="epoch", ylabel=label)
        axes.legend(fontsize=8, frameon=False)
        tidy(axes)
