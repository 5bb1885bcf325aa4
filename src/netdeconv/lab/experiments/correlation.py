"""How correlated the patches are that every layer of a trained network sees, before and after whitening."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from netdeconv.inspect import LayerView, Responses, inspect_layers
from netdeconv.lab.experiments.comparison import METHODS
from netdeconv.lab.experiments.correlation_report import present
from netdeconv.lab.experiments.experiment import Experiment
from netdeconv.lab.experiments.trained import CODE, TrainedSettings, trained
from netdeconv.lab.workspace import Workspace

__all__ = ["EXPERIMENT"]

_DRAWN = 72  # features of a correlation matrix that are kept to be drawn, 8 channels of 3x3 taps


def run(settings: TrainedSettings, workspace: Workspace) -> dict[str, Any]:
    """Train both networks, look into them."""
    workspace.progress.expect(2 * len(METHODS))
    result: dict[str, Any] = {"settings": dataclasses.asdict(settings), "networks": {}}
    for norm in METHODS:
        found = trained(workspace, settings, norm)
        part = workspace.part(
            norm,
            {**dataclasses.asdict(settings), "norm": norm},
            lambda found=found: {"layers": _layers(inspect_layers(*found.look()))},  # type: ignore[misc]
        )
        result["networks"][norm] = {**part, "accuracy": found.accuracy}
    return result


def _layers(views: list[LayerView]) -> list[dict[str, Any]]:
    """Numbers of every layer, and matrices of the first, the middle and the last convolution."""
    maps = [view.name for view in views if "Conv" in view.kind]
    drawn = {maps[0], maps[len(maps) // 2], maps[-1]} if maps else set()
    layers = []
    for view in views:
        layers.append(
            {
                "name": view.name,
                "kind": view.kind,
                "features": view.features,
                "taps": view.taps,
                "rows": view.rows,
                "condition": view.condition,
                "residual": view.root_residual,
                "before": _numbers(view.raw, view.name in drawn),
                "after": None if view.whitened is None else _numbers(view.whitened, view.name in drawn),
            }
        )
    return layers


def _numbers(responses: Responses, drawn: bool) -> dict[str, Any]:
    kept: dict[str, Any] = {key: getattr(responses, key) for key in ("correlation", "pixelwise", "channelwise")}
    return {**kept, "matrix": _rounded(responses.matrix) if drawn else None}


def _rounded(matrix: Tensor) -> list[list[float]]:
    return [[round(abs(float(value)), 2) for value in row] for row in matrix[:_DRAWN, :_DRAWN]]


EXPERIMENT = Experiment(
    name="correlation",
    claim="Whitening removes the pixel-wise and the channel-wise correlation of what every layer sees.",
    source="abstract and section 3",
    sizes={
        "smoke": TrainedSettings(dataset="digits", network="small", width=1.0, images=128),
        "small": TrainedSettings(),
        "paper": TrainedSettings(network="vgg16", width=1.0, epochs=20),
    },
    run=run,
    present=present,
    code=("inspect", *CODE, "lab/experiments/correlation.py"),
)
