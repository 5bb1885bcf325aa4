"""How whitening's share of the step grows with channels, batch and map size, for one convolution."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from netdeconv import WhitenedConv2d
from netdeconv.lab.benchmark.candidates import move_to_step, period_of, steady_step
from netdeconv.lab.benchmark.record import start
from netdeconv.lab.benchmark.settings import ScalingSettings
from netdeconv.lab.benchmark.timing import Candidate, interleaved_times
from netdeconv.lab.devices import device_of
from netdeconv.lab.progress import Progress
from netdeconv.lab.report import Table

__all__ = ["AXES", "LayerStep", "Point", "layer_steps", "points", "run", "tables"]

AXES = {"channels": "channels", "batch": "batch size", "size": "map size"}
Point = tuple[int, int, int]  # channels, batch, size
_NAMES = ("plain", "batchnorm", "default")


def points(settings: ScalingSettings) -> list[tuple[str, Point]]:
    """What is varied, and the values of all three."""
    channels, batch, size = settings.base_channels, settings.base_batch, settings.base_size
    return [
        *(("channels", (value, batch, size)) for value in settings.channels),
        *(("batch", (channels, value, size)) for value in settings.batches),
        *(("size", (channels, batch, value)) for value in settings.sizes),
    ]


class LayerStep:
    """Forward, backward (also to the input) and SGD of one layer."""

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        self.layer, self.x = layer.to(x.device), x.clone().requires_grad_()
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)
        self.period = period_of(layer)

    def __call__(self) -> None:
        y = self.layer(self.x)
        y.backward(y.detach())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.x.grad = None

    def prepare(self, refresh: bool) -> None:
        """Let the next step be one with a refresh, or one without."""
        if self.period > 1:
            move_to_step(self.layer, steady_step(self.period) + int(not refresh))


def layer_steps(point: Point, device: torch.device, seed: int = 0) -> dict[str, LayerStep]:
    """The candidates: a plain convolution, one with batch norm, a whitened one."""
    channels, batch, size = point
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x = torch.randn(batch, channels, size, size).to(device)
        layers = {
            "plain": nn.Conv2d(channels, channels, 3, padding=1),
            "batchnorm": nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
            ),
            "default": WhitenedConv2d(channels, channels, 3, padding=1),
        }
    return {name: LayerStep(layer, x) for name, layer in layers.items()}


def run(settings: ScalingSettings, progress: Progress, result: dict[str, Any]) -> None:
    """Every point once, also where two axes meet."""
    device = device_of(settings.device)
    refreshes = -(-settings.rounds // 2)
    plan = tuple(i % 3 == 1 for i in range(3 * refreshes))[: settings.rounds + refreshes]
    result["points"] = []
    measured: dict[Point, dict[str, Any]] = {}
    for axis, point in points(settings):
        if point not in measured:
            channels, batch, size = point
            start(progress, f"{channels} channels, batch {batch}, map {size}", len(_NAMES) * (2 + len(plan)))
            measured[point] = _measure(point, plan, device, settings.seed, progress)
        result["points"].append({"axis": axis, **measured[point]})


def _measure(
    point: Point, plan: tuple[bool, ...], device: torch.device, seed: int, progress: Progress
) -> dict[str, Any]:
    steps = layer_steps(point, device, seed)
    for step, refresh in itertools.product(steps.values(), (True, False)):
        step.prepare(refresh)
        step()
        progress.step()
    found = interleaved_times(
        [Candidate(name, step, step.period, step.prepare) for name, step in steps.items()],
        plan,
        device=device,
        seed=seed,
        tick=progress.step,
    )
    ratios = {name: found.ratio(name, "plain") for name in _NAMES if name != "plain"}
    return {
        "channels": point[0],
        "batch": point[1],
        "size": point[2],
        "times": {name: found.summary(name) for name in _NAMES},
        "to_plain": ratios,
        "share": {name: _share(ratio) for name, ratio in ratios.items()},
        "seconds": {name: list(seconds) for name, seconds in found.times.items()},
        "plan": list(plan),
    }


def _share(ratio: Mapping[str, Any]) -> dict[str, Any]:
    """Share of the step that the plain convolution does not account for: 1 - 1 / ratio."""
    return {"value": 1 - 1 / ratio["value"], "interval": [1 - 1 / bound for bound in ratio["interval"]]}


def tables(result: Mapping[str, Any]) -> dict[str, Table]:
    """One table for each thing that is varied."""
    found = {}
    for axis, name in AXES.items():
        mine = [point for point in result.get("points", []) if point["axis"] == axis]
        if not mine:
            continue
        others = ", ".join(f"{AXES[other]} {mine[0][other]}" for other in AXES if other != axis)
        found[f"By {name}; {others}; 3x3 convolution, training step"] = Table(
            (name, "plain ms", "whitened ms", "ordinary", "refresh", "whitening's share", "batch norm's share"),
            [
                (
                    str(point[axis]),
                    f"{1000 * point['times']['plain']['step']:.2f}",
                    f"{1000 * point['times']['default']['step']:.2f}",
                    *(f"{1000 * point['times']['default'][kind]['median']:.2f}" for kind in ("ordinary", "refresh")),
                    *(f"{100 * point['share'][which]['value']:.1f} %" for which in ("default", "batchnorm")),
                )
                for point in mine
            ],
        )
    return found
