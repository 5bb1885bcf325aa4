"""Table, figure and verdict of the trainings on CIFAR."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from netdeconv.lab import published
from netdeconv.lab.experiments.experiment import Picture, Presentation
from netdeconv.lab.experiments.trials import NAMES, accuracies, accuracy_cell, best_rate, by_rate
from netdeconv.lab.report import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PAPER_RATE", "present"]

PAPER_RATE = 0.1
NETWORKS = {
    "vgg11": "VGG-11", "vgg16": "VGG-16", "resnet18": "ResNet-18", "preact_resnet18": "PreAct-18",
    "densenet121": "DenseNet-121", "resnext29_32x4d": "ResNeXt-29", "mobilenet_v2": "MobileNetV2", "dpn92": "DPN-92",
    "pnasnet_a": "PNASNetA", "senet18": "SENet-18", "efficientnet_b0": "EfficientNet",
}  # fmt: skip
DATASETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "digits": "digits, enlarged"}


class Case(NamedTuple):
    """What is compared: one network on one data set for so many epochs."""

    dataset: str
    network: str
    width: float
    epochs: int


def present(result: Mapping[str, Any]) -> Presentation:
    """What came out, also of a run that has not ended."""
    cases: dict[Case, dict[str, list[Mapping[str, Any]]]] = {}
    for run in result["runs"]:
        case = Case(run["dataset"], run["network"], run["width"], run["epochs"])
        cases.setdefault(case, {}).setdefault(run["norm"], []).append(run)
    tables = [_accuracy_table(cases), _rates_table(cases)]
    figure = Picture(
        "cifar-rates",
        "Test accuracy by learning rate: one line for each network, batch normalisation blue, whitened orange.",
        lambda figure: _draw(figure, cases),
    )
    return Presentation(_verdict(cases), tables, [figure])


def _others(norms: Mapping[str, Any]) -> list[str]:
    return [norm for norm in norms if norm != "bn"]


def _accuracy_table(cases: Mapping[Case, Mapping[str, list[Mapping[str, Any]]]]) -> Table:
    others = list(dict.fromkeys(norm for norms in cases.values() for norm in _others(norms)))
    rows = []
    for case, norms in cases.items():
        bn = by_rate(norms.get("bn", []))
        best = best_rate(norms["bn"]) if bn else None
        cells = [accuracy_cell(bn.get(PAPER_RATE, []))]
        cells += [f"{accuracy_cell(bn[best])} ({best:g})" if best is not None else ""]
        for norm in others:
            runs = norms.get(norm, [])
            cells.append(f"{accuracy_cell(by_rate(runs)[best_rate(runs)])} ({best_rate(runs):g})" if runs else "")
        was = published.cifar(case.dataset, case.network, case.epochs)
        cells += [f"{was.bn:.2f} / {was.nd:.2f} %" if was else ""]
        label = NETWORKS.get(case.network, case.network)
        rows.append([label, f"{case.width:g}", DATASETS[case.dataset], str(case.epochs), *cells])
    columns = ["network", "width", "data", "epochs", f"BN at {PAPER_RATE:g}", "BN at its best rate"]
    columns += [f"{NAMES.get(norm, norm)} at its best rate" for norm in others] + ["published BN / ND, full width"]
    note = (
        "Test accuracy after the last epoch, in brackets the learning rate; ± is the standard deviation over seeds. "
        f"Batch {_only(cases, 'batch_size')}, weight decay {_only(cases, 'weight_decay')}, momentum 0.9, cosine per "
        "step. Width is the factor on the channels; the published values are of the full width, so that only the "
        "differences compare. The best rate is the best on the test images, for all alike, of those tried: "
        f"{_tried(cases)}."
    )
    return Table(columns, rows, title="Test accuracy", note=note)


def _tried(cases: Mapping[Case, Mapping[str, list[Mapping[str, Any]]]]) -> str:
    """The rates of every norm; not every network may have had them all yet."""
    rates: dict[str, set[float]] = {}
    for norms in cases.values():
        for norm, runs in norms.items():
            rates.setdefault(norm, set()).update(run["rate"] for run in runs)
    return "; ".join(
        f"{NAMES.get(norm, norm)} {', '.join(f'{rate:g}' for rate in sorted(found))}" for norm, found in rates.items()
    )


def _only(cases: Mapping[Case, Mapping[str, list[Mapping[str, Any]]]], key: str) -> str:
    values = dict.fromkeys(run[key] for norms in cases.values() for runs in norms.values() for run in runs)
    return ", ".join(f"{value:g}" for value in values)


def _rates_table(cases: Mapping[Case, Mapping[str, list[Mapping[str, Any]]]]) -> Table:
    rows = []
    for case, norms in cases.items():
        for norm, runs in norms.items():
            for rate, same in sorted(by_rate(runs).items(), reverse=True):
                loss = [run["curves"]["train/loss"][-1] for run in same]
                shown = "diverged" if None in loss else f"{statistics.fmean(loss):.3f}"
                seconds = statistics.median(run["seconds_per_step"] for run in same)
                name = f"{NETWORKS.get(case.network, case.network)}, {case.epochs}"
                cells = [NAMES.get(norm, norm), f"{rate:g}", ", ".join(str(run["seed"]) for run in same)]
                rows.append([name, *cells, accuracy_cell(same), shown, f"{seconds:.3f}"])
    columns = ["network, epochs", "norm", "rate", "seeds", "test accuracy", "training loss", "s per step"]
    note = (
        "Training loss: mean over the last epoch. Seconds: median over the steps, on a machine that did other work too."
    )
    return Table(columns, rows, title="Every rate", note=note)


def _verdict(cases: Mapping[Case, Mapping[str, list[Mapping[str, Any]]]]) -> str:
    against_paper, against_best, compared = [], [], []
    for case, norms in cases.items():
        if "bn" not in norms or "nd" not in norms:
            continue
        nd = statistics.fmean(accuracies(by_rate(norms["nd"])[best_rate(norms["nd"])]))
        bn = by_rate(norms["bn"])
        compared.append(NETWORKS.get(case.network, case.network))
        if PAPER_RATE in bn:
            against_paper.append(nd - statistics.fmean(accuracies(bn[PAPER_RATE])))
        if len(bn) > 1:  # one rate is no choice
            against_best.append(nd - statistics.fmean(accuracies(bn[best_rate(norms["bn"])])))
    if not compared:
        return "Nothing to compare yet."
    return " ".join(
        [
            _sentence("at the paper's rate", against_paper),
            _sentence("at its own best rate", against_best),
        ]
    )


def _sentence(which: str, gaps: list[float]) -> str:
    if not gaps:
        return f"Batch normalisation {which} was not run or not searched for yet."
    ahead = sum(gap > 0 for gap in gaps)
    reach = f"{min(gaps):+.1f} to {max(gaps):+.1f}" if len(gaps) > 1 else f"{gaps[0]:+.1f}"
    word = "holds" if ahead == len(gaps) else "does not hold" if ahead == 0 else "holds in part"
    return (
        f"Against batch normalisation {which} the claim {word}: network deconvolution is ahead in {ahead} of "
        f"{len(gaps)} comparisons ({reach} points)."
    )


def _draw(figure: Figure, cases: Mapping[Case, Mapping[str, list[Mapping[str, Any]]]]) -> None:
    from netdeconv.lab.plots import STYLES, tidy

    columns = min(3, len(cases)) or 1
    rows = -(-len(cases) // columns) or 1
    figure.set_size_inches(3.4 * columns, 2.7 * rows + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
    for axes, (case, norms) in zip(grid, cases.items(), strict=False):
        for norm, runs in norms.items():
            groups = sorted(by_rate(runs).items())
            style = STYLES["bn" if norm == "bn" else "nd"]
            means = [statistics.fmean(accuracies(same)) for _, same in groups]
            line = "--" if norm not in ("bn", "nd") else "-"
            axes.plot([rate for rate, _ in groups], means, line, label=NAMES.get(norm, norm), markersize=5, **style)
        axes.set(xscale="log", title=f"{NETWORKS.get(case.network, case.network)}, {case.epochs} epochs")
        axes.title.set_fontsize(9)
        axes.set_xlabel("learning rate", fontsize=8)
        axes.set_ylabel("test accuracy, %", fontsize=8)
        axes.legend(fontsize=7, frameon=False)
        tidy(axes)
    for axes in list(grid):
        axes.set_axis_off()
