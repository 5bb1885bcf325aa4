"""Time and error of the covariance, and of the root it gives, by how many patches are looked at."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from netdeconv import WhiteningConfig
from netdeconv.functional import (
    Blocks,
    Moments,
    Window,
    channel_variance,
    corner_patches,
    inverse_sqrt,
    patch_moments,
    spread_patches,
)
from netdeconv.lab.benchmark.record import start
from netdeconv.lab.benchmark.settings import MomentsSettings
from netdeconv.lab.benchmark.timing import Candidate, interleaved_times
from netdeconv.lab.devices import device_of
from netdeconv.lab.progress import Progress
from netdeconv.lab.report import Table

__all__ = ["activations", "run", "samplings", "tables"]

ALL = "all positions"
_WINDOW = Window(kernel_size=(3, 3), stride=(1, 1), dilation=(1, 1), padding=((1, 1), (1, 1)))
_SCALES = (1, 2, 4, 8)  # cell sizes of the noise that is summed up

# The moments at a refresh; ``turn`` counts refreshes.
Sampling = Callable[[Tensor, Blocks, Tensor], Moments]


def activations(batch: int, channels: int, size: int, seed: int = 0) -> Tensor:
    """Maps like those inside a network: smooth, correlated between channels, rectified, unlike from image to image."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.zeros(batch, channels, size, size)
    for cell in _SCALES:
        coarse = torch.randn(batch, channels, -(-size // cell), -(-size // cell), generator=draw)
        x += F.interpolate(coarse, size=(size, size), mode="nearest")
    mix = torch.randn(channels, channels, generator=draw) / channels**0.5
    bright = torch.rand(batch, 1, 1, 1, generator=draw) + 0.5
    return (torch.einsum("nchw,dc->ndhw", x, mix) * bright).relu()


def samplings(settings: MomentsSettings) -> dict[str, Sampling]:
    """By name, all positions first."""
    config = WhiteningConfig()
    found: dict[str, Sampling] = {ALL: partial(_spread, stride=1, max_samples=None)}
    for samples in settings.samples:
        default = " (default)" if samples == config.max_samples else ""
        found[f"spread, {samples} rows{default}"] = partial(_spread, stride=config.sampling_stride, max_samples=samples)
    for stride in settings.strides:
        found[f"corner, stride {stride}"] = partial(_corner, stride=stride)
    return found


def _spread(x: Tensor, blocks: Blocks, turn: Tensor, *, stride: int, max_samples: int | None) -> Moments:
    sample = spread_patches(x, _WINDOW, sampling_stride=stride, max_samples=max_samples, turn=turn)
    return patch_moments(sample.rows, blocks, sample.weights)


def _corner(x: Tensor, blocks: Blocks, turn: Tensor, *, stride: int) -> Moments:
    sample = corner_patches(x, _WINDOW, sampling_stride=stride)
    return patch_moments(sample.rows, blocks, sample.weights)


def run(settings: MomentsSettings, progress: Progress, result: dict[str, Any]) -> None:
    """Errors averaged over refreshes, then times in turn, for every shape of the map."""
    device = device_of(settings.device)
    rows: list[dict[str, Any]] = []
    result["rows"] = rows
    for shape in settings.shapes:
        channels, size = settings.parsed(shape)
        config = WhiteningConfig().resolved("dense", channels)
        assert config.block_size is not None
        x = activations(settings.batch, channels, size, settings.seed).to(device)
        x = x / channel_variance(x)[1].sqrt().reshape(1, -1, 1, 1)  # as the default scales them
        blocks = Blocks.plan(channels, _WINDOW, 1, config.block_size, config.grouping)
        known = samplings(settings)
        start(progress, f"maps {shape}", len(known) * (1 + settings.rounds))
        turns = [torch.tensor(turn, device=device) for turn in range(settings.refreshes)]
        exact = known[ALL](x, blocks, turns[0])
        found: dict[str, dict[str, Any]] = {}
        for name, moments in known.items():
            tried = [_errors(moments(x, blocks, turn), exact, config) for turn in turns]
            found[name] = {key: statistics.fmean(error[key] for error in tried) for key in tried[0]}
            progress.step()
        times = interleaved_times(
            [Candidate(name, partial(moments, x, blocks, turns[0])) for name, moments in known.items()],
            (False,) * settings.rounds,
            device=device,
            seed=settings.seed,
            tick=progress.step,
        )
        rows += [
            {
                "shape": shape,
                "sampling": name,
                "time": times.summary(name),
                "to_all": times.ratio(name, ALL) if name != ALL else None,
                "errors": found[name],
                "seconds": list(times.times[name]),
            }
            for name in known
        ]


def _errors(found: Moments, exact: Moments, config: WhiteningConfig) -> dict[str, float]:
    """Relative Frobenius distances of mean, covariance and root; the share of rows looked at."""
    pairs = {
        "mean": (found.mean, exact.mean),
        "cov": (found.covs[0], exact.covs[0]),
        "root": (_root(found.covs[0], config), _root(exact.covs[0], config)),
    }
    distances = {
        name: float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)) for name, (a, b) in pairs.items()
    }
    return {**distances, "rows": found.rows}


def _root(cov: Tensor, config: WhiteningConfig) -> Tensor:
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    assert config.num_iters is not None
    return inverse_sqrt(cov + config.eps * eye, num_iters=config.num_iters, solver=config.solver)


def tables(result: Mapping[str, Any]) -> dict[str, Table]:
    """One table for each shape of the map."""
    found = {}
    rows = result.get("rows", [])
    for shape in dict.fromkeys(row["shape"] for row in rows):
        found[f"Maps {shape} (channels x size); relative error against all positions"] = Table(
            ("sampling", "rows", "ms", "/ all", "sample mean", "covariance", "root"),
            [
                (
                    row["sampling"],
                    f"{row['errors']['rows']:.0f}",
                    f"{1000 * row['time']['step']:.2f}",
                    f"{row['to_all']['value']:.3f}" if row["to_all"] else "1",
                    *(f"{100 * row['errors'][key]:.2f} %" for key in ("mean", "cov", "root")),
                )
                for row in rows
                if row["shape"] == shape
            ],
        )
    return found
