"""Tables and pictures of the trainings on CIFAR, for each data set and number of epochs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from netdeconv.lab import published
from netdeconv.lab.experiments.cifar_picture import draw
from netdeconv.lab.experiments.comparison import accuracy_cell, best_rate, by_rate, finals, grouped, loss_cell
from netdeconv.lab.experiments.experiment import Picture, Presentation
from netdeconv.lab.norms import NORMS
from netdeconv.lab.optimizers import OPTIMIZERS
from netdeconv.lab.report import Table

__all__ = ["PAPER_RATE", "present"]

PAPER_RATE = 0.1
NETWORKS = {
    "vgg11": "VGG-11", "vgg16": "VGG-16", "resnet18": "ResNet-18", "preact_resnet18": "PreAct-18",
    "densenet121": "DenseNet-121", "resnext29_32x4d": "ResNeXt-29", "mobilenet_v2": "MobileNetV2", "dpn92": "DPN-92",
    "pnasnet_a": "PNASNetA", "senet18": "SENet-18", "efficientnet_b0": "EfficientNet",
}  # fmt: skip
DATASETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "digits": "digits, enlarged"}

Runs = Sequence[Mapping[str, Any]]


class Case(NamedTuple):
    """A network, and its trainings by norm."""

    network: str
    width: float
    runs: dict[str, list[Mapping[str, Any]]]

    @property
    def label(self) -> str:
        return NETWORKS.get(self.network, self.network)

    def accuracy(self, norm: str, rate: float | None) -> float | None:
        """Mean over seeds; ``None`` where it was not trained at this rate."""
        same = by_rate(self.runs.get(norm, [])).get(rate) if rate is not None else None
        return statistics.fmean(finals(same)) if same else None

    def best(self, norm: str) -> float | None:
        """The best of the rates tried."""
        return best_rate(self.runs[norm]) if norm in self.runs else None


class Group:
    """All networks on one data set for so many epochs.

    Args:
        dataset, epochs: which.
        runs: of any network, in any order.
    """

    def __init__(self, dataset: str, epochs: int, runs: Runs) -> None:
        self.dataset, self.epochs, self.runs = dataset, epochs, runs
        cases = grouped(runs, lambda run: (run["network"], run["width"]))
        self.cases = [
            Case(network, width, grouped(same, lambda run: run["norm"])) for (network, width), same in cases.items()
        ]
        self.norms = list(dict.fromkeys(run["norm"] for run in runs))
        self.others = [norm for norm in self.norms if norm != "bn"]

    @property
    def title(self) -> str:
        return f"{DATASETS[self.dataset]}, {self.epochs} {'epoch' if self.epochs == 1 else 'epochs'}"

    def rates(self, norm: str) -> list[float]:
        """All that were tried, the highest first."""
        return sorted({run["rate"] for run in self.runs if run["norm"] == norm}, reverse=True)

    def one_rate(self, norm: str) -> float:
        """The rate for all networks: the best on average of those that most of them were trained at."""

        def merit(rate: float) -> tuple[int, float]:
            found = [value for case in self.cases if (value := case.accuracy(norm, rate)) is not None]
            return len(found), statistics.fmean(found)

        return max(self.rates(norm), key=merit)

    def lead(self, case: Case, norm: str) -> float | None:
        """Points of a norm at its one rate above batch normalisation at its best rate for this network."""
        mine, theirs = case.accuracy(norm, self.one_rate(norm)), case.accuracy("bn", case.best("bn"))
        return None if mine is None or theirs is None else mine - theirs

def present(result: Mapping[str, Any]) -> Presentation:
    """What came out, also of a run that has not ended."""
    runs = grouped(result["runs"], lambda run: (run["dataset"], run["epochs"]))
    groups = [Group(dataset, epochs, same) for (dataset, epochs), same in runs.items()]
    tables = [*map(_accuracy_table, groups), *map(_rates_table, groups)]
    pictures = [picture for group in groups for picture in _pictures(group, len(groups))]
    return Presentation(tables, pictures)


def _accuracy_table(group: Group) -> Table:
    columns = ["network", "width", f"BN at {PAPER_RATE:g}", "BN at its best rate"]
    for norm in group.others:
        columns += [f"{NORMS[norm].label} at {rate:g}" for rate in group.rates(norm)]
        columns += [f"lead of {NORMS[norm].label} at {group.one_rate(norm):g}"]
    rows = [_row(group, case) for case in group.cases]
    means = _mean_row(group)
    note = (
        "Test accuracy after the last epoch, mean and standard deviation over seeds; in brackets the learning rate. "
        f"Batch {_only(group, 'batch_size')}, weight decay {_only(group, 'weight_decay')}, momentum 0.9, cosine per "
        f"step. Tried: {_tried(group)}. Best means best on the test images. Lead: points above BN at its best rate for "
        "each network, at one rate for all networks, the best on average. Width is the factor on the channels; the "
        "published values are of the full width, so that only the differences compare."
    )
    optimizers = {run.get("optimizer", "sgd") for run in group.runs if run["norm"] == "bn"} - {"sgd"}
    note += "".join(f" BN has {OPTIMIZERS[name]}, without SGD's weight decay." for name in sorted(optimizers))
    title = f"{group.title}: test accuracy"
    return Table([*columns, "published BN / ND, full width"], [*rows, *means], title=title, note=note)


def _row(group: Group, case: Case) -> list[str]:
    bn = by_rate(case.runs.get("bn", []))
    best = case.best("bn")
    cells = [accuracy_cell(bn.get(PAPER_RATE, [])), f"{accuracy_cell(bn[best])} ({best:g})" if best is not None else ""]
    for norm in group.others:
        mine = by_rate(case.runs.get(norm, []))
        cells += [accuracy_cell(mine.get(rate, [])) for rate in group.rates(norm)]
        lead = group.lead(case, norm)
        cells += ["" if lead is None else f"{lead:+.1f}"]
    was = published.cifar(group.dataset, case.network, group.epochs)
    return [case.label, f"{case.width:g}", *cells, f"{was.bn:.2f} / {was.nd:.2f} %" if was else ""]


def _mean_row(group: Group) -> list[list[str]]:
    """The mean over all networks, where there are several and all have everything."""
    columns: list[list[float | None]] = [
        [case.accuracy("bn", PAPER_RATE) for case in group.cases],
        [case.accuracy("bn", case.best("bn")) for case in group.cases],
    ]
    leads = []
    for norm in group.others:
        columns += [[case.accuracy(norm, rate) for case in group.cases] for rate in group.rates(norm)]
        leads.append(len(columns))
        columns += [[group.lead(case, norm) for case in group.cases]]
    if len(group.cases) < 2 or any(None in column for column in columns):
        return []
    means = [statistics.fmean(value for value in column if value is not None) for column in columns]
    cells = [f"{mean:+.1f}" if i in leads else f"{mean:.1f} %" for i, mean in enumerate(means)]
    return [["mean", "", *cells, ""]]


def _tried(group: Group) -> str:
    """The rates of every norm; not every network may have had them all yet."""
    return "; ".join(
        f"{NORMS[norm].label} {', '.join(f'{rate:g}' for rate in group.rates(norm))}" for norm in group.norms
    )


def _only(group: Group, key: str) -> str:
    return ", ".join(f"{value:g}" for value in dict.fromkeys(run[key] for run in group.runs))


def _rates_table(group: Group) -> Table:
    rows = []
    for case in group.cases:
        for norm, runs in case.runs.items():
            for rate, same in reversed(by_rate(runs).items()):
                seconds = statistics.median(run["seconds_per_step"] for run in same)
                cells = [NORMS[norm].label, f"{rate:g}", ", ".join(str(run["seed"]) for run in same)]
                rows.append([case.label, *cells, accuracy_cell(same), loss_cell(same), f"{seconds:.3f}"])
    columns = ["network", "norm", "rate", "seeds", "test accuracy", "training loss", "s per step"]
    note = (
        "Training loss: mean over the last epoch. Seconds: median over the steps, on a machine that did other work too."
    )
    return Table(columns, rows, title=f"{group.title}: every rate", note=note)


def _pictures(group: Group, groups: int) -> list[Picture]:
    """Accuracy by rate, and by epoch where there are several."""
    panels = {f"{case.label}, width {case.width:g}": case.runs for case in group.cases}
    place = "" if groups == 1 else f"-{group.dataset}-{group.epochs}"
    settings: dict[str, Any] = {"title": group.title, "panels": panels}
    end = "mean over seeds and the seeds' range."
    pictures = [Picture(f"cifar-rates{place}", f"{group.title}: test accuracy by learning rate, {end}",
                        partial(draw, **settings))]  # fmt: skip
    if group.epochs > 1:
        caption = f"{group.title}: test accuracy by epoch, every norm at its best rate, {end}"
        pictures.append(Picture(f"cifar-curves{place}", caption, partial(draw, **settings, by_epoch=True)))
    return pictures
