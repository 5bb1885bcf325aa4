"""Tables and figures of the experiment on linear models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from netdeconv.lab.experiments.experiment import Picture, Presentation
from netdeconv.lab.report import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["INPUTS", "LEAST_SQUARES_RATES", "LOGISTIC_RATES", "NEAR", "present"]

INPUTS = {
    "raw": "raw, 0 to 1",
    "standardised": "standardised",
    "exact": "whitened, exact root",
    "steps15": "whitened, 15 steps",
    "steps5": "whitened, 5 steps",
}
# Rates that are tried, times 1 / largest eigenvalue of G; gradient descent diverges from 2 on.
LEAST_SQUARES_RATES = (1.0, 1.5, 1.9, 1.99)
# The same for the logistic loss of ten classes, whose curvature at the start is a tenth of G's.
LOGISTIC_RATES = (2.0, 5.0, 10.0, 15.0)
_DATASETS = {"digits": "scikit-learn's digits", "mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}
NEAR = 0.01  # of the closed-form optimum
_ROUNDING = 1e-12  # of sums in float64, as a share of the optimum


def present(result: Mapping[str, Any]) -> Presentation:
    """What came out."""
    figures = [
        Picture(
            "regression-loss",
            "Excess of the L2 loss over the closed-form optimum, by iteration of gradient descent.",
            lambda figure: _draw_losses(figure, result),
        ),
        Picture(
            "regression-eigenvalues",
            "Eigenvalues of the input's second moment, which gradient descent sees: all 1 means one iteration.",
            lambda figure: _draw_eigenvalues(figure, result),
        ),
    ]
    return Presentation([_squares_table(result), _logistic_table(result)], figures)


def _excess(result: Mapping[str, Any], loss: float | None) -> float | None:
    return None if loss is None else loss / result["optimum"] - 1


def _squares_table(result: Mapping[str, Any]) -> Table:
    last = len(result["inputs"]["raw"]["losses"]) - 1
    shown = [k for k in (1, 10, 100) if k < last] + [last]
    rows = []
    for kind, name in INPUTS.items():
        one = result["inputs"][kind]
        large, small = one["eigenvalues"][0], one["eigenvalues"][-1]
        spread = f"{large / small:.2g}" if small > 1e-13 * large else "singular"
        excess = [_percent(_excess(result, one["losses"][k])) for k in shown]
        rows.append([name, f"{one['rate']:.3g}", *excess, _count(one["iterations"]), spread])
    layer = _percent(_excess(result, result["layer"]))
    rows.append(["WhitenedLinear, one step of SGD", "1", layer, *[""] * (len(shown) + 1)])
    spectrum, eps = result["spectrum"], result["settings"]["eps"]
    note = (
        f"{_DATASETS[result['settings']['dataset']]}, {result['images']} images of {result['pixels']} pixels, full "
        f"batch, one-hot targets, weights and bias from 0, float64. Optimum {result['optimum']:.5f}; the best constant "
        f"has {result['constant_model']:.5f}. The rate is 1 for whitened input, which is exact for G = I; for the "
        f"others it is the best after {last} iterations of {_listed(LEAST_SQUARES_RATES)} over G's largest eigenvalue. "
        f"Iterations to 1 % follow from the eigenvalues. The covariance's eigenvalues go from "
        f"{spectrum['smallest']:.2g} to {spectrum['largest']:.3g}; eps = {eps:g} is above {result['below_eps']} of "
        f"them, and {result['constant_pixels']} pixels are constant: eps keeps their gain finite, and a direction of "
        "variance v takes 1 - eps / (v + eps) of its way in the first step."
    )
    columns = ["input", "rate", *(f"after {k}" for k in shown), "iterations to 1 %", "condition of G"]
    return Table(columns, rows, title="L2 loss above the closed-form optimum, by iterations", note=note)


def _logistic_table(result: Mapping[str, Any]) -> Table:
    last = len(result["logistic"]["raw"]["losses"]) - 1
    shown = [k for k in (1, 10) if k < last] + [last]
    rows = [
        [
            name,
            f"{result['logistic'][kind]['rate']:.3g}",
            *(_number(result["logistic"][kind]["losses"][k]) for k in shown),
            f"{100 * result['logistic'][kind]['accuracy']:.2f} %",
        ]
        for kind, name in INPUTS.items()
    ]
    note = (
        "Full batch, weights and bias from 0 (loss 2.3026), float32; rate: best after the last iteration of "
        f"{_listed(LOGISTIC_RATES)} over the largest eigenvalue of G."
    )
    columns = ["input", "rate", *(f"loss after {k}" for k in shown), f"test accuracy after {last}"]
    return Table(columns, rows, title="Logistic regression: cross entropy by iterations", note=note)


def _listed(rates: Sequence[float]) -> str:
    *first, last = (f"{rate:g}" for rate in rates)
    return f"{', '.join(first)} and {last}"


def _or_infinity(value: float | None) -> float:
    return float("inf") if value is None else value


def _percent(share: float | None) -> str:
    if share is None:
        return "diverged"
    share = 0.0 if abs(share) < _ROUNDING else share
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def _number(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.4f}"


def _count(iterations: int | None) -> str:
    return "over a billion" if iterations is None else f"{iterations:,}"


def _draw_losses(figure: Figure, result: Mapping[str, Any]) -> None:
    from netdeconv.lab.plots import LINES, tidy

    axes = figure.subplots()
    for (kind, name), style in zip(INPUTS.items(), LINES, strict=False):
        losses = result["inputs"][kind]["losses"]
        marked = sorted({0, *(round(10 ** (i / 4)) for i in range(20) if round(10 ** (i / 4)) < len(losses))})
        excess = [max(_or_infinity(loss) / result["optimum"] - 1, 1e-9) for loss in losses]
        axes.plot(range(len(losses)), excess, label=name, markevery=marked, markersize=4, linewidth=1.4, **style)
    axes.axhline(NEAR, color="0.4", linewidth=0.9, linestyle=":")
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(0, None)
    axes.set(yscale="log", xlabel="iteration", ylabel="loss / optimum - 1", ylim=(1e-7, None))
    axes.legend(fontsize=8, frameon=False)
    tidy(axes)


def _draw_eigenvalues(figure: Figure, result: Mapping[str, Any]) -> None:
    from netdeconv.lab.plots import LINES, tidy

    axes = figure.subplots()
    for (kind, name), style in zip(INPUTS.items(), LINES, strict=False):
        values = [max(value, 1e-12) for value in result["inputs"][kind]["eigenvalues"]]
        axes.plot(range(1, len(values) + 1), values, label=name, markevery=0.1, markersize=4, linewidth=1.4, **style)
    axes.set(xscale="log", yscale="log", xlabel="number of the eigenvalue", ylabel="eigenvalue of G", ylim=(1e-7, None))
    axes.legend(fontsize=8, frameon=False)
    tidy(axes)
