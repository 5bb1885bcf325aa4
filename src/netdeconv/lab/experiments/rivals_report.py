"""Table and picture of the rivals."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from netdeconv.lab.experiments.cifar_report import NETWORKS
from netdeconv.lab.experiments.experiment import Picture, Presentation
from netdeconv.lab.experiments.trials import accuracies, accuracy_cell, best_rate, by_rate
from netdeconv.lab.methods import Method
from netdeconv.lab.report import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["of_method", "present"]

Runs = Sequence[Mapping[str, Any]]


def of_method(runs: Runs, network: str, width: float, method: Method) -> list[Mapping[str, Any]]:
    """The runs of one method on one network."""
    place = (network, width, *method)
    return [run for run in runs if (run["network"], run["width"], run["norm"], run["optimizer"]) == place]


def present(result: Mapping[str, Any]) -> Presentation:
    """What came out, also of a run that has not ended."""
    runs, times = result["runs"], result["times"]
    rows, ahead = [], []
    for network, time in times.items():
        found = _methods(runs, network)
        rows += [_row(network, method, mine, time) for method, mine in found.items()]
        for what, of in (("the same steps", _same_steps), ("the same seconds", _same_seconds)):
            means = [(statistics.fmean(accuracies(best)), _label(network, method)) for method, mine in found.items()
                     if (best := of(mine, time, method))]  # fmt: skip
            if len(means) > 1:
                accuracy, label = max(means)
                ahead.append(f"{_title(network)}, after {what}: {label} is ahead with {accuracy:.1f} %.")
    first = runs[0]
    base = _label(_network(first), Method(first["norm"], first["optimizer"]))
    columns = ["network", "method", "rate", "same steps", "time of a step", "same seconds", "all rates"]
    epochs = "1 epoch" if first["epochs"] == 1 else f"{first['epochs']} epochs"
    note = (
        f"Test accuracy after {epochs}, mean and standard deviation over seeds. Batch {first['batch_size']}, cosine "
        f"per step; SGD has momentum 0.9 and weight decay {first['weight_decay']:g}. Rate: the best on the test images "
        "with one seed, for all alike. Time of a step: over that of "
        f"{base}, with a 95 % interval, of steps that took turns in one process. Same seconds: trained anew at that "
        f"rate, in as many steps as take the time of {base}. Width is the factor on the channels."
    )
    table = Table(columns, rows, title="Rivals", note=note)
    caption = "Test accuracy by the seconds of training steps, each method at its best rate, mean of the seeds."
    return Presentation(" ".join(ahead), [table], [Picture("rivals", caption, lambda f: _draw(f, runs, times))])


def _methods(runs: Runs, network: str) -> dict[Method, list[Mapping[str, Any]]]:
    """The runs on a network by method, in the order in which they were planned."""
    found: dict[Method, list[Mapping[str, Any]]] = {}
    for run in runs:
        if network == _network(run):
            found.setdefault(Method(run["norm"], run["optimizer"]), []).append(run)
    return found


def _network(run: Mapping[str, Any]) -> str:
    return run["network"] if run["width"] == 1 else f"{run['network']}@{run['width']:g}"


def _same_steps(mine: Runs, *_: object) -> Runs:
    """The runs at the best rate."""
    whole = [run for run in mine if not run.get("same_seconds")]
    return by_rate(whole)[best_rate(whole)]


def _same_seconds(mine: Runs, time: Mapping[str, Any], method: Method) -> Runs:
    """The runs that had the first method's time; those of the first one itself are its runs at the best rate."""
    anew = [run for run in mine if run.get("same_seconds")]
    return anew if anew or time["ratios"][str(method)]["value"] != 1 else _same_steps(mine)


def _row(network: str, method: Method, mine: Runs, time: Mapping[str, Any]) -> list[str]:
    best = _same_steps(mine)
    tried = by_rate(run for run in mine if not run.get("same_seconds"))
    rates = ", ".join(f"{accuracies(same)[0]:.1f} ({rate:g})" for rate, same in sorted(tried.items(), reverse=True))
    ratio = time["ratios"][str(method)]
    step = "1" if ratio["value"] == 1 else "{:.2f} ({:.2f} to {:.2f})".format(ratio["value"], *ratio["interval"])
    seconds = accuracy_cell(_same_seconds(mine, time, method))
    label = _label(network, method)
    return [_title(network), label, f"{best[0]['rate']:g}", accuracy_cell(best), step, seconds, rates]


def _label(network: str, method: Method) -> str:
    """The transformer has layer norms, which stay."""
    return method.label.replace("BatchNorm", "LayerNorm") if network.startswith("vit") else method.label


def _title(network: str) -> str:
    name, _, width = network.partition("@")
    return NETWORKS.get(name, name) + (f", width {width}" if width else "")


def _draw(figure: Figure, runs: Runs, times: Mapping[str, Any]) -> None:
    from netdeconv.lab.plots import tidy

    width = max(6.0, 4.0 * len(times))
    figure.set_size_inches(width, 4.6)
    panels = figure.subplots(1, len(times), squeeze=False)[0]
    for axes, (network, time) in zip(panels, times.items(), strict=True):
        for method, mine in _methods(runs, network).items():
            best = _same_steps(mine)
            curves = zip(*(run["curves"]["test/accuracy"] for run in best), strict=True)
            means = [100 * statistics.fmean(value or 0.0 for value in at) for at in curves]
            epoch = time["seconds"][str(method)] * best[0]["steps"] / best[0]["epochs"]
            at = [number * epoch for number in range(1, len(means) + 1)]
            axes.plot(at, means, label=_label(network, method), markersize=4, linewidth=1.3, **method.style)
        axes.set(title=_title(network), xlabel="seconds of training steps")
        axes.set_xlim(left=0)
        axes.title.set_fontsize(9)
        tidy(axes)
    panels[0].set_ylabel("test accuracy, %")
    shown = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": int(width / 2)}
    figure.legend(shown.values(), shown.keys(), **place, fontsize=8, frameon=False)
