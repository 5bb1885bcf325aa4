"""The filters that whiten images, and how well a centre with a surround describes them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from torch import Tensor

from netdeconv.inspect import centre_filters, patch_covariance, root_filters
from netdeconv.lab.data import create_data, photographs
from netdeconv.lab.difference_of_gaussians import fit_difference_of_gaussians
from netdeconv.lab.experiments.experiment import Experiment
from netdeconv.lab.experiments.filters_report import ROOTS, present
from netdeconv.lab.options import check_fields, option
from netdeconv.lab.workspace import Workspace

__all__ = ["EXPERIMENT", "FiltersSettings"]

# How each root is computed; eps is in squared units of pixels from 0 to 1.
_COMPUTED: dict[str, dict[str, Any]] = {
    "exact": {"solver": "eigh"},
    "steps15": {"num_iters": 15},
    "steps5": {"num_iters": 5},
    "zca": {"solver": "eigh", "eps": 0.0},
}

_SOURCES = ("photographs", "cifar10")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FiltersSettings:
    """What is whitened."""

    images: tuple[str, ...] = option(_SOURCES, "scikit-learn's photographs, CIFAR-10's images", choices=_SOURCES)
    sizes: tuple[int, ...] = option((3, 5, 7, 9), "kernel sizes")
    count: int = option(2000, "images of CIFAR-10")
    stride: int = option(2, "distance of the patches of photographs; those of CIFAR-10 are all looked at")

    def __post_init__(self) -> None:
        check_fields(self)


def run(settings: FiltersSettings, workspace: Workspace) -> dict[str, Any]:
    """Filters of the centre pixel, in colour and in grey, by every root."""
    workspace.progress.expect(len(settings.images) * len(settings.sizes))
    result: dict[str, Any] = {"settings": dataclasses.asdict(settings), "filters": []}
    for source in settings.images:
        stride = settings.stride if source == "photographs" else 1
        count = settings.count if source == "cifar10" else 2
        for size in settings.sizes:
            found = workspace.part(
                f"{source}-{size}",
                {"source": source, "size": size, "stride": stride, "count": count},
                lambda source=source, size=size, stride=stride, count=count: {  # type: ignore[misc]
                    "entries": _filters(_images(source, count), size, stride)
                },
            )
            result["filters"] += [{"source": source, "size": size, **entry} for entry in found["entries"]]
    return result


@functools.lru_cache(maxsize=1)
def _images(source: str, count: int) -> Tensor:
    """``(N, 3, H, W)``, values 0 to 1."""
    if source == "photographs":
        return photographs()
    data: Any = create_data("cifar10")
    data.setup()
    return data.parts["train"][0][:count].float() / 255


def _filters(images: Tensor, size: int, stride: int) -> list[dict[str, Any]]:
    """One entry for colours and grey and for every root."""
    entries = []
    for colours, seen in (("colour", images), ("grey", images.mean(1, keepdim=True))):
        cov = patch_covariance(seen, size, stride=stride)
        for root in ROOTS:
            centre = centre_filters(root_filters(cov, size, **_COMPUTED[root]))
            own = centre[len(centre) // 2, len(centre) // 2]  # green to green, or grey to grey
            middle = float(own[size // 2, size // 2])
            entries.append(
                {
                    "colours": colours,
                    "root": root,
                    "weights": [[[[round(float(w), 4) for w in row] for row in own] for own in out] for out in centre],
                    "peak": middle,
                    "negative_share": (middle - float(own.sum())) / middle,
                    "fit": dataclasses.asdict(fit_difference_of_gaussians(own)),
                }
            )
    return entries


EXPERIMENT = Experiment(
    name="filters",
    claim="The filters that whiten natural images have a centre and an opposite surround, as cells of the retina have.",
    source="abstract and figure 1",
    sizes={
        "smoke": FiltersSettings(images=("photographs",), sizes=(3, 5), stride=6),
        "small": FiltersSettings(),
        "paper": FiltersSettings(sizes=(3, 5, 7, 9, 11), count=50000, stride=1),
    },
    run=run,
    present=present,
    devices=("cpu",),
    code=("inspect", "lab/difference_of_gaussians.py", "lab/experiments/filters.py"),
)
