"""What each setting of whitening does: one is changed at a time, all else stays at the library's default."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from netdeconv import WhiteningConfig
from netdeconv.lab.experiments.comparison import accuracy_cell, finals, grouped, loss_cell
from netdeconv.lab.experiments.experiment import Experiment, Picture, Presentation
from netdeconv.lab.norms import NORMS
from netdeconv.lab.options import check_fields, option
from netdeconv.lab.report import Table
from netdeconv.lab.train import CODE, Training, run_trainings
from netdeconv.lab.workspace import Workspace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "AblationSettings"]

# What is changed, and to which values; the default is among the runs anyway.
_VARIATIONS: Mapping[str, tuple[Any, ...]] = {
    "block_size": (8, 16, 64),
    "sampling_stride": (1, 2, 6),
    "num_iters": (1, 2, 5, 15),
    "eps": (1e-7, 1e-3, 1e-1),
    "scale": (False,),
    "update_every": (1, 4, 64),
    "average": ("root",),
    "differentiable": (True,),
    "sampling": ("spread",),
}
_NAMES = {
    "block_size": "block size",
    "sampling_stride": "sampling stride",
    "num_iters": "iterations",
    "eps": "eps",
    "scale": "scaled channels",
    "update_every": "refresh every .. steps",
    "average": "average of the",
    "differentiable": "gradient through the statistics",
    "sampling": "positions",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblationSettings:
    """What is trained."""

    dataset: str = option("cifar10", "data set", choices=("cifar10", "digits"))
    network: str = option("vgg11", "network of the zoo")
    width: float = option(0.125, "factor on its channels")
    vary: tuple[str, ...] = option(tuple(_VARIATIONS), "settings to change", choices=tuple(_VARIATIONS))
    values: int = option(4, "most values of a setting to try, besides its default")
    steps: int = option(120, "training steps; the learning rate falls to zero over them")
    epochs: int | None = option(None, "passes over the training images, instead of --steps", kind=int)
    rate: float = option(0.1, "learning rate of network deconvolution")
    bn_rates: tuple[float, ...] = option((0.05, 0.02), "learning rates of batch normalisation, the baseline")
    default_seeds: int = option(3, "seeds of the default: their spread is the noise level")
    seeds: int = option(1, "seeds of all else")
    batch_size: int = option(128, "images in a training batch")

    def __post_init__(self) -> None:
        check_fields(self)


def run(settings: AblationSettings, workspace: Workspace) -> Mapping[str, Any]:
    """Train what is not finished yet."""
    base = Training(
        dataset=settings.dataset,
        network=settings.network,
        width=settings.width,
        norm="nd",
        rate=settings.rate,
        steps=settings.steps if settings.epochs is None else None,
        epochs=settings.epochs or 1,
        batch_size=settings.batch_size,
    )
    plan = [dataclasses.replace(base, seed=seed) for seed in range(settings.default_seeds)]
    for seed in range(settings.seeds):
        plan += [dataclasses.replace(base, norm="bn", rate=rate, seed=seed) for rate in settings.bn_rates]
        plan.append(dataclasses.replace(base, norm="nd-paper", seed=seed))
        for name in settings.vary:
            for value in _VARIATIONS[name][: settings.values]:
                plan.append(dataclasses.replace(base, whitening=((name, value),), seed=seed))
    return run_trainings(plan, workspace, defaults=_defaults())


def _defaults() -> dict[str, Any]:
    """The settings of 3x3 convolutions, most of the layers; but the size of blocks goes by the channels."""
    return {**dataclasses.asdict(WhiteningConfig().resolved("dense", 1)), "block_size": None}


def _label(run: Mapping[str, Any]) -> tuple[str, Any]:
    """Group and value of a run."""
    if run["norm"] == "bn":
        return "BatchNorm, rate", run["rate"]
    if run["norm"] == "nd-paper":
        return "published procedure", ""
    if not run["whitening"]:
        return "default", ""
    return next(iter(run["whitening"].items()))


def present(result: Mapping[str, Any]) -> Presentation:
    """What came out."""
    groups = grouped(result["runs"], _label)
    default = finals(groups["default", ""])
    middle, noise = statistics.fmean(default), statistics.stdev(default) if len(default) > 1 else None
    rows = []
    for (name, value), runs in groups.items():
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        was = f" (default {_default(result, name)})" if name in _VARIATIONS else ""
        gap = "" if name == "default" else f"{statistics.fmean(finals(runs)) - middle:+.1f}"
        seconds = statistics.median(run["seconds_per_step"] for run in runs)
        label = f"{_NAMES.get(name, name)} {shown}{was}".strip()
        rows.append([label, str(len(runs)), loss_cell(runs), accuracy_cell(runs), gap, f"{1000 * seconds:.0f}"])
    first = result["runs"][0]
    note = (
        f"{first['network']} at width {first['width']:g} on {first['dataset']}, {first['steps']} steps of batch "
        f"{first['batch_size']}, rate {first['rate']:g} on a cosine to 0, weight decay {first['weight_decay']:g}; "
        "loss: training loss, mean over the last epoch's steps; test accuracy with the running statistics. The "
        "default's seeds "
        f"{'have a standard deviation of ' + format(noise, '.1f') + ' points' if noise is not None else 'are one'}: a "
        "difference below twice that means little for a single seed. Time: median over the steps, so without most "
        "refreshes, on a machine that did other work too."
    )
    columns = ["setting", "seeds", "loss", "test accuracy", "points from the default", "ms per step"]
    table = Table(columns, rows, title="One setting changed at a time", note=note)
    picture = Picture(
        "ablation-accuracy",
        "Test accuracy of every setting; the grey band is the default with twice its seeds' standard deviation.",
        lambda figure: _draw(figure, groups, middle, noise),
    )
    return Presentation([table], [picture])


def _default(result: Mapping[str, Any], name: str) -> Any:
    """Of the library that the result is of."""
    value = result.get("defaults", _defaults())[name]
    if value is None:
        return "32, in wide layers 16"
    return f"{value:g}" if isinstance(value, float) else value


def _draw(
    figure: Figure, groups: Mapping[tuple[str, Any], list[Mapping[str, Any]]], middle: float, noise: float | None
) -> None:
    from netdeconv.lab.plots import tidy

    figure.set_size_inches(7.5, 1 + 0.24 * len(groups))
    axes = figure.subplots()
    labels = [f"{_NAMES.get(name, name)} {value}".strip() for name, value in groups]
    places = range(len(groups), 0, -1)
    means = [statistics.fmean(finals(runs)) for runs in groups.values()]
    colours = [NORMS["bn" if name.startswith("BatchNorm") else "nd"].style["color"] for name, _ in groups]
    axes.axvspan(middle - 2 * (noise or 0), middle + 2 * (noise or 0), color="0.88")
    axes.axvline(middle, color="0.5", linewidth=0.9)
    axes.scatter(means, list(places), c=colours, zorder=3)
    axes.set_yticks(list(places), labels, fontsize=8)
    axes.set_xlabel("test accuracy, %")
    tidy(axes)


EXPERIMENT = Experiment(
    name="ablation",
    claim="The published settings are a good choice: blocks of 64 channels, sampling stride 3, 5 iterations, eps 1e-5.",
    source="the published settings",
    sizes={
        "smoke": AblationSettings(
            dataset="digits",
            width=0.0625,
            vary=("num_iters", "differentiable"),
            values=1,
            steps=5,
            default_seeds=2,
            bn_rates=(0.02,),
            batch_size=32,
        ),
        "small": AblationSettings(),
        "paper": AblationSettings(
            width=1.0, steps=391, bn_rates=(0.1, 0.05, 0.02, 0.01), default_seeds=5, seeds=3, values=10
        ),
    },
    run=run,
    present=present,
    code=("lab/experiments/ablation.py", *CODE),
)
