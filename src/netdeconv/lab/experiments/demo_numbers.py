"""What the demo's runs amount to, in numbers and in words: the chosen rates, the table, the verdict."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from netdeconv.lab.report import Table

if TYPE_CHECKING:
    from netdeconv.lab.experiments.demo import Run
    from netdeconv.lab.experiments.demo_settings import DemoSettings

__all__ = [
    "accuracy_text",
    "choose_rate",
    "mean_and_spread",
    "method_numbers",
    "setting_line",
    "shown_epochs",
    "table",
    "verdict",
]

_NEAR = 0.01  # learning rates whose validation accuracy is this near to the best one's count as good as it


def method_numbers(
    norm: str, name: str, settings: DemoSettings, results: Mapping[Run, Mapping[str, Any]]
) -> dict[str, Any]:
    """One method's grid, and its runs at the learning rate chosen on the validation split."""
    runs = {rate: [r for run, r in results.items() if run.norm == norm and run.rate == rate] for rate in settings.rates}
    grid = [
        {
            "rate": rate,
            "validation_accuracy": [r["curves"]["validation/accuracy"][-1] for r in found],
            "validation_loss": [r["curves"]["validation/loss"][-1] for r in found],
            "test_accuracy": [r["curves"]["test/accuracy"][-1] for r in found],
            "diverged": sum(r["diverged"] for r in found),
        }
        for rate, found in runs.items()
    ]
    rate = choose_rate(grid)
    chosen = runs[rate]
    curves = {key: [r["curves"][key] for r in chosen] for key in chosen[0]["curves"]}
    accuracy = curves["test/accuracy"]
    fresh = [r["fresh_accuracy"] for r in chosen]
    best = max(statistics.fmean(entry["validation_accuracy"]) for entry in grid)
    reached = [next((e for e, a in enumerate(run, 1) if a >= settings.target), None) for run in accuracy]
    every = [r for found in runs.values() for r in found if not r["diverged"]] or chosen
    return {
        "name": name,
        "parameters": chosen[0]["parameters"],
        "rate": rate,
        "rate_at_edge": len(settings.rates) > 2 and rate in (min(settings.rates), max(settings.rates)),
        "rates_near_best": sum(statistics.fmean(e["validation_accuracy"]) >= best - _NEAR for e in grid),
        "diverged": sum(entry["diverged"] for entry in grid),
        "test_accuracy": [mean_and_spread(at) for at in zip(*accuracy, strict=True)],
        "fresh_accuracy": {**mean_and_spread(fresh), "per_seed": fresh},
        "epochs_to_target": {"target": settings.target, "per_seed": reached},
        "seconds_per_step": statistics.median(r["seconds_per_step"] for r in every),
        "seconds_per_late_step": statistics.median(r["seconds_per_late_step"] for r in every),
        "curves": curves,
        "grid": grid,
    }


def choose_rate(grid: Sequence[Mapping[str, Any]]) -> float:
    """Highest mean validation accuracy after the last epoch; of equal ones the lowest validation loss."""

    def quality(entry: Mapping[str, Any]) -> tuple[float, float]:
        losses = [float("inf") if v is None or v != v else v for v in entry["validation_loss"]]
        return (round(statistics.fmean(entry["validation_accuracy"]), 9), -statistics.fmean(losses))

    return float(max(grid, key=quality)["rate"])


def table(metrics: Mapping[str, Any]) -> Table:
    """The demo's one table."""
    methods = list(metrics["methods"].values())
    epochs = len(methods[0]["test_accuracy"])
    target = metrics["settings"]["target"]
    rows = [[f"learning rate, best of {len(metrics['settings']['rates'])}", *(f"{m['rate']:g}" for m in methods)]]
    for epoch in shown_epochs(epochs):
        label = f"test accuracy after epoch {epoch}"
        rows.append([label, *(accuracy_text(m["test_accuracy"][epoch - 1]) for m in methods)])
        if epoch == 1:
            rows.append(["· with statistics recomputed", *(accuracy_text(m["fresh_accuracy"]) for m in methods)])
    rows.append([f"epochs to {100 * target:g} % on the test split", *(_reached(m) for m in methods)])
    rows.append(["ms per training step", *(f"{1e3 * m['seconds_per_step']:.1f}" for m in methods)])
    rows.append(["ms per step, second half", *(f"{1e3 * m['seconds_per_late_step']:.1f}" for m in methods)])
    label = f"rates within {100 * _NEAR:g} point of the best"
    rows.append([label, *(f"{m['rates_near_best']} of {len(m['grid'])}" for m in methods)])
    if any(m["diverged"] for m in methods):
        count = len(metrics["runs"]) // len(methods)
        rows.append(["diverged runs", *(f"{m['diverged']} of {count}" for m in methods)])
    return Table(["", *(m["name"] for m in methods)], rows)


def verdict(metrics: Mapping[str, Any]) -> list[str]:
    """What the table says, in words that follow from its numbers."""
    bn, nd = metrics["methods"]["bn"], metrics["methods"]["nd"]
    epochs = len(bn["test_accuracy"])
    fresh = [m["fresh_accuracy"]["per_seed"] for m in (nd, bn)]
    lines = [_gap_line("After epoch 1", *_at(1, nd, bn)), _gap_line("The same, statistics recomputed,", *fresh)]
    if epochs > 1:
        lines.append(_gap_line(f"After epoch {epochs}", *_at(epochs, nd, bn)))
    ratio = nd["seconds_per_step"] / bn["seconds_per_step"]
    late = nd["seconds_per_late_step"] / bn["seconds_per_late_step"]
    lines.append(
        f"A step takes {ratio:.2f} times as long as BatchNorm's, {late:.2f} times in the second half, when "
        "the statistics are refreshed less often."
    )
    for method in (bn, nd):
        if method["rate_at_edge"]:
            lines.append(
                f"The rate chosen for {method['name']} is at the edge of the grid: a better one may lie beyond."
            )
    return lines


def _at(epoch: int, *methods: Mapping[str, Any]) -> list[list[float]]:
    return [[curve[epoch - 1] for curve in method["curves"]["test/accuracy"]] for method in methods]


def _gap_line(when: str, nd: Sequence[float], bn: Sequence[float]) -> str:
    """Difference of the methods, seed by seed; one that is not above its own spread is called none."""
    gap = mean_and_spread([100 * (ours - theirs) for ours, theirs in zip(nd, bn, strict=True)])
    mean, sd = gap["mean"] or 0.0, gap["sd"]
    around = "" if sd is None else f" ± {sd:.1f}"
    if abs(mean) <= (sd or 0):
        return f"{when} the two do not differ by more than the seeds do ({mean:+.1f}{around} points)."
    return f"{when} network deconvolution is {abs(mean):.1f}{around} points {'ahead' if mean > 0 else 'behind'}."


def setting_line(metrics: Mapping[str, Any]) -> str:
    """How the table's numbers came about, in one paragraph."""
    s, data = metrics["settings"], metrics["data"]
    seeds = f"{s['seeds']} seeds" if s["seeds"] > 1 else "1 seed"
    around = "mean ± standard deviation over seeds" if s["seeds"] > 1 else "a single seed, so no spread"
    return (
        f"{data['name']}: {data['train']} images to train on, {data['validation']} to choose the learning rate, "
        f"{data['test']} for the table; {seeds} at each of {len(s['rates'])} learning rates for either method, "
        f"{s['epochs']} epochs of batch {s['batch_size']}, SGD with momentum {s['momentum']:g} and a cosine "
        f"schedule; {around}; times with {s['threads']} thread(s), median over runs. Statistics recomputed: the "
        "averages that evaluation uses can lag behind in the first epoch; here both methods' are taken anew from the "
        "training images."
    )


def shown_epochs(epochs: int) -> list[int]:
    """All epochs when they are few, else the first ones, some between, and the last."""
    if epochs <= 10:
        return list(range(1, epochs + 1))
    few = [e for e in (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000) if e < epochs]
    return [*few, epochs]


def accuracy_text(at: Mapping[str, Any]) -> str:
    """A mean and its spread, from shares of 1, in per cent."""
    around = "" if at["sd"] is None else f" ± {100 * at['sd']:.1f}"
    return f"{100 * at['mean']:.1f}{around} %"


def mean_and_spread(values: Sequence[float]) -> dict[str, float | None]:
    """``mean`` and ``sd``, standard deviation of a sample; one value has none."""
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def _reached(method: Mapping[str, Any]) -> str:
    seeds = method["epochs_to_target"]["per_seed"]
    reached = [epoch for epoch in seeds if epoch is not None]
    if not reached:
        return "not reached"
    mean = f"{statistics.fmean(reached):.1f}"
    return mean if len(reached) == len(seeds) else f"{mean} ({len(reached)} of {len(seeds)} seeds)"
