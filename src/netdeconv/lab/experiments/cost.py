"""What whitening costs beside the convolution it belongs to: operations on paper, and time, layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from netdeconv import WhiteningConfig
from netdeconv.lab import published
from netdeconv.lab.benchmark.scaling import LayerStep
from netdeconv.lab.benchmark.timing import Candidate, interleaved_times
from netdeconv.lab.experiments.cost_flops import Convolution, convolutions, whitening_flops
from netdeconv.lab.experiments.experiment import Experiment, Picture, Presentation
from netdeconv.lab.networks import network
from netdeconv.lab.options import check_fields, option
from netdeconv.lab.report import Table
from netdeconv.lab.workspace import Workspace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "CostSettings"]

_METHODS = {"paper": "published", "default": "default"}
_TIMED = ("plain", "batchnorm", "default", "paper")
_PARTS = ("moments", "root", "fold")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostSettings:
    """Which network's convolutions are measured, each for itself."""

    network: str = option("vgg11", "network of the zoo")
    width: float = option(1.0, "factor on its channels")
    batch_size: int = option(128, "images in a batch")
    image_size: int = option(32, "height and width of the images")
    rounds: int = option(4, "steps of each candidate with a refresh, and twice as many without")

    def __post_init__(self) -> None:
        check_fields(self)


def _configs() -> dict[str, WhiteningConfig]:
    return {"paper": WhiteningConfig.paper(), "default": WhiteningConfig()}


def _measure(one: Convolution, settings: CostSettings, workspace: Workspace) -> dict[str, Any]:
    """Operations and times of one layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(settings.batch_size, one.channels, one.size, one.size)
        layers: dict[str, nn.Module] = {
            "plain": one.plain(),
            "batchnorm": nn.Sequential(one.plain(bias=False), nn.BatchNorm2d(one.outputs)),
            **{name: one.whitened(config) for name, config in _configs().items()},
        }
    steps = {name: LayerStep(layer, x) for name, layer in layers.items()}
    plan = (False, True, False) * settings.rounds
    workspace.progress.start_run(one.name, len(_TIMED) * len(plan))
    for step in steps.values():
        for refresh in (True, False):
            step.prepare(refresh)
            step()
    found = interleaved_times(
        [Candidate(name, steps[name], steps[name].period, steps[name].prepare) for name in _TIMED],
        plan,
        device=x.device,
        tick=workspace.progress.step,
    )
    return {
        "flops": {
            "convolution": one.flops(settings.batch_size),
            **{name: whitening_flops(layers[name], x) for name in _METHODS},  # type: ignore[arg-type]
        },
        "seconds": {name: found.summary(name)["step"] for name in _TIMED},
        "to_plain": {name: found.ratio(name, "plain") for name in _TIMED if name != "plain"},
    }


def run(settings: CostSettings, workspace: Workspace) -> Mapping[str, Any]:
    """Every different convolution of the network."""
    net = network(settings.network, settings.width)
    layers = convolutions(net, settings.image_size)
    workspace.progress.expect(len(layers))
    shared = {**dataclasses.asdict(settings), "threads": torch.get_num_threads()}
    found = []
    for number, one in enumerate(layers, start=1):
        plain = dataclasses.asdict(one)
        name, about = f"layer-{number}", {**shared, **plain}
        new = workspace.finished(name, about) is None
        measured = workspace.part(
            name,
            about,
            lambda one=one: _measure(one, settings, workspace),  # type: ignore[misc]
        )
        found.append({"name": one.name, **plain, **measured})
        if new:  # else more may have been published already
            workspace.publish({"settings": shared, "layers": found})
    return {"settings": shared, "layers": found}


def _added(layer: Mapping[str, Any], method: str) -> float:
    """Operations that whitening adds, as a share of the convolution's."""
    flops = layer["flops"]
    return sum(flops[method].values()) / flops["convolution"]


def _total(layers: list[Mapping[str, Any]], method: str, part: str | None = None) -> float:
    base = sum(layer["flops"]["convolution"] * layer["count"] for layer in layers)
    own = [layer["flops"][method] for layer in layers]
    added = [one[part] if part else sum(one.values()) for one in own]
    return sum(a * layer["count"] for a, layer in zip(added, layers, strict=True)) / base


def _time(layers: list[Mapping[str, Any]], name: str) -> float:
    plain, mine = (sum(layer["seconds"][key] * layer["count"] for layer in layers) for key in ("plain", name))
    return mine / plain


def present(result: Mapping[str, Any]) -> Presentation:
    """What came out."""
    layers, settings = result["layers"], result["settings"]
    rows = []
    for layer in layers:
        flops = layer["flops"]
        times = f", {layer['count']} times" if layer["count"] > 1 else ""
        cells = [f"{layer['name']}{times}", f"{flops['convolution'] / 1e9:.3g}"]
        for method in _METHODS:
            cells += [f"{100 * flops[method][part] / flops['convolution']:.2g}" for part in _PARTS]
        cells.append(_ms(layer["seconds"]["plain"]))
        cells += [f"{layer['to_plain'][name]['value']:.2f}" for name in ("batchnorm", "default", "paper")]
        rows.append(cells)
    cells = ["all layers", f"{sum(one['flops']['convolution'] * one['count'] for one in layers) / 1e9:.3g}"]
    cells += [f"{100 * _total(layers, method, part):.2g}" for method in _METHODS for part in _PARTS]
    cells.append(_ms(sum(one["seconds"]["plain"] * one["count"] for one in layers)))
    rows.append(cells + [f"{_time(layers, name):.2f}" for name in ("batchnorm", "default", "paper")])
    columns = ["convolution", "GFLOP"]
    columns += [f"{name}: {part} %" for name in _METHODS.values() for part in _PARTS]
    columns += ["plain ms", "BatchNorm x", "default x", "published x"]
    note = (
        f"{settings['network']} at width {settings['width']:g}, batch {settings['batch_size']}, images of "
        f"{settings['image_size']}x{settings['image_size']}; each layer for itself with an input of noise: a training "
        "step, forward, backward also to the input, and SGD. GFLOP: of the plain convolution's step, counted on paper; "
        "per cent: what whitening adds to it, counted alike, refreshes shared out over their period. Times: medians of "
        f"steps taken in turn in one process on {settings['threads']} thread(s), as multiples of the plain one's."
    )
    cost = Table(columns, rows, title="Operations and time of a training step, by layer", note=note)
    elsewhere = [
        [f"{row.network}, {row.dataset}", _range(row.ratio), row.remark] for row in published.COST if row.ratio[0] > 0
    ]
    others = Table(
        ["network", "ND / BatchNorm", "remark"],
        elsewhere,
        title="Published: training time of the authors' code on a V100, as multiples of batch normalisation's",
        note=f"Source: {published.STUDY}.",
    )
    picture = Picture(
        "cost-layers",
        "Operations that whitening adds, and time, for each layer as shares of the plain convolution's.",
        lambda figure: _draw(figure, layers),
    )
    return Presentation([cost, others], [picture])


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f}" if seconds >= 0.1 else f"{1000 * seconds:.2g}"


def _range(ratio: tuple[float, float]) -> str:
    low, high = ratio
    return f"{low:g}x" if low == high else f"{low:g}x to {high:g}x"


def _draw(figure: Figure, layers: list[Mapping[str, Any]]) -> None:
    from netdeconv.lab.plots import LINES, tidy

    figure.set_size_inches(10, 4)
    left, right = figure.subplots(1, 2)
    places = range(len(layers))
    names = [layer["name"].replace(", ", "\n") for layer in layers]
    for style, (method, name) in zip(LINES, _METHODS.items(), strict=False):
        left.plot(places, [_added(layer, method) for layer in layers], label=name, **style)
    for style, (key, name) in zip(
        LINES, {"paper": "published", "default": "default", "batchnorm": "BatchNorm"}.items(), strict=False
    ):
        right.plot(places, [layer["to_plain"][key]["value"] for layer in layers], label=name, **style)
    left.set(ylabel="added operations / convolution's", yscale="log")
    right.set(ylabel="time / plain convolution's", yscale="log")
    for axes in (left, right):
        axes.axhline(1, color="0.4", linewidth=0.9, linestyle=":")
        axes.set_xticks(list(places), names, fontsize=6, rotation=60)
        axes.legend(fontsize=8, frameon=False)
        tidy(axes)


EXPERIMENT = Experiment(
    name="cost",
    claim="Network deconvolution costs a fraction of the convolutions.",
    source="abstract",
    sizes={
        "smoke": CostSettings(width=0.0625, batch_size=8, rounds=1),
        "small": CostSettings(rounds=3),
        "paper": CostSettings(network="vgg16", rounds=10),
    },
    run=run,
    present=present,
    devices=("cpu",),
    code=("lab/experiments/cost.py", "lab/experiments/cost_flops.py", "lab/benchmark"),
)
