"""Table and picture of the rivals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from netdeconv.lab.experiments.cifar import network_text
from netdeconv.lab.experiments.cifar_report import NETWORKS
from netdeconv.lab.experiments.comparison import accuracy_cell, at_epochs, by_rate, finals, grouped, line, tuned
from netdeconv.lab.experiments.experiment import Picture, Presentation
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
    first = runs[0]
    first_method = Method(first["norm"], first["optimizer"])
    rows = []
    for network, time in times.items():
        for method, mine in _methods(runs, network).items():
            rows.append(_row(network, method, mine, time, is_base=method == first_method))
    base = _label(_network(first), first_method)
    columns = ["network", "method", "rate", "same steps", "time of a step", "same seconds", "all rates"]
    epochs = "1 epoch" if first["epochs"] == 1 else f"{first['epochs']} epochs"
    note = (
        f"Test accuracy after {epochs}, mean and standard deviation over seeds. Batch {first['batch_size']}, cosine "
        f"per step; SGD has momentum 0.9 and weight decay {first['weight_decay']:g}. Rate: the best on the test images "
        "with the first seed, for all alike. Time of a step: over that of "
        f"{base}, with a 95 % interval, of steps that took turns in one process. Same seconds: trained anew at that "
        f"rate, in as many steps as take the time of {base}. Width is the factor on the channels."
    )
    table = Table(columns, rows, title="Rivals", note=note)
    caption = "Test accuracy by the seconds of training steps, each method at its best rate, mean of the seeds."
    return Presentation([table], [Picture("rivals", caption, lambda f: _draw(f, runs, times))])


def _methods(runs: Runs, network: str) -> dict[Method, list[Mapping[str, Any]]]:
    """The runs on a network by method, in the order in which they were planned."""
    here = (run for run in runs if network == _network(run))
    return grouped(here, lambda run: Method(run["norm"], run["optimizer"]))


def _network(run: Mapping[str, Any]) -> str:
    return network_text(run["network"], run["width"])


def _same_steps(mine: Runs) -> Runs:
    """The runs at the best rate."""
    return tuned(run for run in mine if not run.get("same_seconds"))


def _row(network: str, method: Method, mine: Runs, time: Mapping[str, Any], *, is_base: bool) -> list[str]:
    whole = _same_steps(mine)
    tried = by_rate(run for run in mine if not run.get("same_seconds"))
    rates = ", ".join(f"{finals(same)[0]:.1f} ({rate:g})" for rate, same in reversed(tried.items()))
    ratio = time["ratios"][str(method)]
    step = "1" if is_base else "{:.2f} ({:.2f} to {:.2f})".format(ratio["value"], *ratio["interval"])
    seconds = accuracy_cell(whole if is_base else [run for run in mine if run.get("same_seconds")])
    label = _label(network, method)
    return [_title(network), label, f"{whole[0]['rate']:g}", accuracy_cell(whole), step, seconds, rates]


def _label(network: str, method: Method) -> str:
    """The transformer has layer norms, which stay."""
    return method.label.replace("BatchNorm", "LayerNorm") if network.startswith("vit") else method.label


def _title(network: str) -> str:
    name, _, width = network.partition("@")
    return NETWORKS.get(name, name) + (f", width {width}" if width else "")


def _draw(figure: Figure, runs: Runs, times: Mapping[str, Any]) -> None:
    from netdeconv.lab.plots import tidy

    figure.set_size_inches(max(6.0, 4.0 * len(times)), 4.6)
    panels = figure.subplots(1, len(times), squeeze=False)[0]
    for axes, (network, time) in zip(panels, times.items(), strict=True):
        for method, mine in _methods(runs, network).items():
            whole = _same_steps(mine)
            epoch = time["seconds"][str(method)] * whole[0]["steps"] / whole[0]["epochs"]
            values = {k * epoch: at for k, at in at_epochs(whole, "test/accuracy").items()}
            line(axes, values, _label(network, method), method.style)
        axes.set(title=_title(network), xlabel="seconds of training steps")
        axes.set_xlim(left=0)
        axes.title.set_fontsize(9)
        tidy(axes)
    panels[0].set_ylabel("test accuracy, %")
    shown = {label: drawn for axes in panels for drawn, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    ncols = min(4, 2 * len(times))
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=ncols, fontsize=8, frameon=False)
