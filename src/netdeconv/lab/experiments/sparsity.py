"""How sparse responses are, raw, standardised and whitened: of photographs, and in every layer of a trained network."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from netdeconv import WhitenedConv2d, WhiteningConfig, calibrate
from netdeconv.inspect import LayerView, Responses, inspect_layers
from netdeconv.lab.data import photographs
from netdeconv.lab.experiments.comparison import METHODS
from netdeconv.lab.experiments.experiment import Experiment
from netdeconv.lab.experiments.sparsity_report import present
from netdeconv.lab.experiments.trained import CODE, TrainedSettings, trained
from netdeconv.lab.options import option
from netdeconv.lab.workspace import Workspace

__all__ = ["EXPERIMENT", "SparsitySettings"]

_ROOTS: dict[str, dict[str, Any]] = {"5 steps": {"num_iters": 5}, "converged": {"solver": "eigh"}}
_PATCHES = 20000  # of the photographs


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsitySettings(TrainedSettings):
    """What is looked at: photographs, and the networks that are trained."""

    kernel_sizes: tuple[int, ...] = option((3, 5, 7), "of the patches of photographs")


def run(settings: SparsitySettings, workspace: Workspace) -> dict[str, Any]:
    """Photographs by kernel size and root, then the layers of both networks."""
    workspace.progress.expect(len(settings.kernel_sizes) * len(_ROOTS) + 2 * len(METHODS))
    result: dict[str, Any] = {"settings": dataclasses.asdict(settings), "photographs": [], "networks": {}}
    for size in settings.kernel_sizes:
        for root, how in _ROOTS.items():
            part = workspace.part(
                f"photographs-{size}-{root.replace(' ', '')}",
                {"size": size, "root": root, "patches": _PATCHES},
                lambda size=size, how=how: _photographs(size, how),  # type: ignore[misc]
            )
            result["photographs"].append({"size": size, "root": root, **part})
    for norm in METHODS:
        found = trained(workspace, settings, norm)
        part = workspace.part(
            norm,
            {**dataclasses.asdict(settings), "norm": norm},
            lambda found=found: {"layers": [_numbers(view) for view in inspect_layers(*found.look())]},  # type: ignore[misc]
        )
        result["networks"][norm] = {**part, "accuracy": found.accuracy}
    return result


def _photographs(size: int, how: dict[str, Any]) -> dict[str, Any]:
    """What a first layer sees of photographs, its statistics exactly theirs."""
    images = photographs()
    whitening = WhiteningConfig(block_size=images.shape[1], **how)
    net = nn.Sequential(WhitenedConv2d(images.shape[1], 1, size, whitening=whitening))
    calibrate(net, images)
    (view,) = inspect_layers(net, images, max_samples=_PATCHES)
    return _numbers(view)


def _numbers(view: LayerView) -> dict[str, Any]:
    return {
        "name": view.name,
        "features": view.features,
        "rows": view.rows,
        "raw": _of(view.raw),
        "standardised": _of(view.standardised),
        "whitened": None if view.whitened is None else _of(view.whitened),
    }


def _of(responses: Responses) -> dict[str, Any]:
    density = [float(f"{value:.3g}") for value in responses.histogram.tolist()]
    return {"kurtosis": responses.kurtosis, "hoyer": responses.hoyer, "histogram": density}


EXPERIMENT = Experiment(
    name="sparsity",
    claim="Whitened responses are sparse: most near zero, few of them large.",
    source="abstract and section 3",
    sizes={
        "smoke": SparsitySettings(dataset="digits", network="small", width=1.0, images=128, kernel_sizes=(3,)),
        "small": SparsitySettings(),
        "paper": SparsitySettings(network="vgg16", width=1.0, epochs=20),
    },
    run=run,
    present=present,
    code=("inspect", *CODE, "lab/experiments/sparsity.py"),
)
