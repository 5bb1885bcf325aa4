"""The files of the demo's run folder: numbers, pictures and the page."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from netdeconv import WhiteningConfig
from netdeconv.inspect import mean_abs_offdiagonal, patch_correlation, whitening_filters
from netdeconv.lab import plots
from netdeconv.lab.data import DigitsData, photographs
from netdeconv.lab.experiments.demo_numbers import (
    accuracy_text,
    mean_and_spread,
    method_numbers,
    setting_line,
    table,
    verdict,
)
from netdeconv.lab.report import Page, Table
from netdeconv.lab.store import write_json, write_whole

if TYPE_CHECKING:
    from netdeconv.lab.experiments.demo import Run
    from netdeconv.lab.experiments.demo_settings import DemoSettings

__all__ = ["FILES", "summary", "write"]

FILES = {
    "report.html": "everything on one page",
    "curves.png": "loss, accuracy, learning rates",
    "filters.png": "whitening filters of two photographs",
    "correlation.png": "patch correlation before and after",
    "metrics.json": "all numbers and settings",
}

_ROOTS: dict[str, dict[str, Any]] = {
    "converged root": {"solver": "eigh"},
    "15 iterations": {"num_iters": 15},
    "5 iterations": {"num_iters": 5},
}
_FILTER_SIZE = 7
_STRIDE = 3  # patches of photographs are plentiful; every third one along each side gives the same picture


def write(
    out: Path,
    settings: DemoSettings,
    names: Mapping[str, str],
    results: Mapping[Run, Mapping[str, Any]],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """Write all files of the run folder; returns what is in ``metrics.json``."""
    data = DigitsData()
    data.setup()
    pictures, whiteness = _whitening_pictures(data.parts["train"][0])
    metrics: dict[str, Any] = {
        "experiment": "demo",
        "written": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": dict(versions),
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
        "settings": {**dataclasses.asdict(settings), "whitening": dataclasses.asdict(WhiteningConfig())},
        "data": {
            "name": "scikit-learn digits",
            "split_seed": data.split_seed,
            **{part: len(labels) for part, (_, labels) in data.parts.items()},
        },
        "methods": {norm: method_numbers(norm, name, settings, results) for norm, name in names.items()},
        "whiteness": whiteness,
        "runs": [{**dataclasses.asdict(run), **result} for run, result in results.items()],
    }
    pictures["curves.png"] = plots.png(plots.curves_figure(metrics["methods"], settings.target))
    for name, content in pictures.items():
        write_whole(out / name, content)
    write_json(out / "metrics.json", metrics)
    write_whole(out / "report.html", _page(metrics, pictures).to_html().encode())
    return metrics


def summary(metrics: Mapping[str, Any], out: Path) -> str:
    """What the command prints at the end."""
    width = max(len(str(out / name)) for name in FILES)
    files = "\n".join(f"  {out / name!s:<{width}}  {what}" for name, what in FILES.items())
    settings = textwrap.fill(setting_line(metrics), 100)
    return "\n\n".join([table(metrics).to_text(), "\n".join(verdict(metrics)), settings, files])


def _whitening_pictures(digits: Tensor) -> tuple[dict[str, bytes], dict[str, dict[str, float]]]:
    photos = photographs()
    filters = {title: whitening_filters(photos, _FILTER_SIZE, stride=_STRIDE, **how) for title, how in _ROOTS.items()}
    rows: dict[str, tuple[int, dict[str, Tensor]]] = {}
    for label, images, size, stride in (
        ("photographs, 3×3 RGB patches", photos, 3, _STRIDE),
        ("digits, 5×5 patches", digits, 5, 1),
    ):
        matrices = {"before": patch_correlation(images, size, stride=stride)}
        for title in ("5 iterations", "converged root"):
            root = whitening_filters(images, size, stride=stride, **_ROOTS[title]).flatten(1)
            matrices[title] = patch_correlation(images, size, stride=stride, root=root)
        rows[label] = (images.shape[1], matrices)
    pictures = {
        "filters.png": plots.png(plots.filters_figure(photos, filters)),
        "correlation.png": plots.png(plots.correlation_figure(rows)),
    }
    numbers = {label: {k: mean_abs_offdiagonal(c) for k, c in found.items()} for label, (_, found) in rows.items()}
    return pictures, numbers


def _page(metrics: Mapping[str, Any], pictures: Mapping[str, bytes]) -> Page:
    page = Page("Network deconvolution and batch normalisation on digits")
    page.paragraph(" ".join(verdict(metrics)))
    page.table(table(metrics))
    page.paragraph(setting_line(metrics), soft=True)
    page.heading("Training")
    page.picture(
        pictures["curves.png"],
        alt="Loss and accuracy by epoch, and validation accuracy by learning rate, for both methods",
        caption="Left and middle: each method at its own best learning rate, mean over seeds, the band from the "
        "worst to the best seed; the dotted line is the accuracy that “epochs to” counts to. Right: every "
        "learning rate tried, on the validation split, which is the one that chose.",
    )
    page.heading("Whitening filters")
    page.picture(
        pictures["filters.png"],
        alt="Whitening filters of photographs, red, green and blue, at three precisions of the root",
        caption=f"What whitening does to a {_FILTER_SIZE}×{_FILTER_SIZE} patch of a photograph: each pixel is "
        "replaced by a weighted sum, and these are the centre pixel's weights. The converged root has a centre and "
        "an opposite surround, as receptive fields early in the visual system do. Five iterations, the published "
        "default, stop long before that: they bound how much weak directions are amplified.",
    )
    page.heading("Correlation of patches")
    page.picture(
        pictures["correlation.png"],
        alt="Absolute correlation matrices of patches before and after whitening",
        caption="How much the pixels of a patch say about each other, before and after whitening: 0 (dark) nothing, "
        "1 (bright) everything. The converged root removes what is linear in it; five iterations remove most.",
    )
    page.heading("Every learning rate")
    page.paragraph("Mean after the last epoch; the choice looked at the validation column only.", soft=True)
    page.table(_grid_table(metrics))
    page.heading("Settings")
    page.table(_settings_table(metrics), words=True)
    return page


def _grid_table(metrics: Mapping[str, Any]) -> Table:
    rows = []
    for method in metrics["methods"].values():
        for entry in method["grid"]:
            values = [accuracy_text(mean_and_spread(entry[k])) for k in _SPLITS]
            chosen = "chosen" if entry["rate"] == method["rate"] else ""
            rows.append([method["name"], f"{entry['rate']:g}", *values, str(entry["diverged"]), chosen])
    return Table(["method", "learning rate", "validation", "test", "diverged runs", ""], rows)


_SPLITS = ("validation_accuracy", "test_accuracy")


def _settings_table(metrics: Mapping[str, Any]) -> Table:
    s = metrics["settings"]
    parameters = ", ".join(f"{m['name']} {m['parameters']:,}" for m in metrics["methods"].values())
    rows = [
        ["network", f"3×3 convolutions with {s['width']}, {2 * s['width']}, {2 * s['width']} channels, ReLU, linear"],
        ["parameters", parameters],
        ["training", f"{s['epochs']} epochs, batch {s['batch_size']}, cosine schedule to 0"],
        ["optimiser", f"SGD, momentum {s['momentum']:g}, weight decay {s['weight_decay']:g} on all parameters"],
        ["learning rates", ", ".join(f"{rate:g}" for rate in s["rates"])],
        ["seeds", ", ".join(map(str, range(s["seeds"])))],
        ["whitening", ", ".join(f"{k}={v}" for k, v in s["whitening"].items())],
        ["data", ", ".join(f"{k} {v}" for k, v in metrics["data"].items() if k != "name")],
        ["versions", ", ".join(f"{k} {v}" for k, v in metrics["versions"].items())],
        ["machine", ", ".join(f"{k} {v}" for k, v in metrics["machine"].items()) + f", threads {s['threads']}"],
        ["written", metrics["written"]],
    ]
    return Table(["setting", "value"], rows)
