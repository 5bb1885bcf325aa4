"""What all pictures have in common: ticks, labels and legends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from netdeconv import WhitenedConv2d, calibrate
from netdeconv.inspect import inspect_layers
from netdeconv.lab.experiments import regression_report, results
from netdeconv.lab.inspect_report import write
from netdeconv.lab.plots import history_figure, tidy


def ticks(axes: Axes, axis: str) -> list[str]:
    """The labels that are drawn within the axes."""
    FigureCanvasAgg(axes.figure).draw()
    shown = getattr(axes, f"{axis}axis")
    low, high = sorted(getattr(axes, f"get_{axis}lim")())
    pairs = [(tick.get_loc(), tick.label1.get_text()) for tick in (*shown.get_major_ticks(), *shown.get_minor_ticks())]
    return [text for place, text in sorted(pairs) if text and low <= place <= high]


@pytest.mark.parametrize(("epochs", "labels"), [(1, ["1"]), (2, ["1", "2"]), (5, list("12345"))])
def test_epochs_are_whole_numbers(epochs: int, labels: list[str]) -> None:
    rows = [
        {"epoch": i + 1, "train/loss": 1 / (i + 1), "test/accuracy": 0.5, "test/pixel_accuracy": 0.6}
        for i in range(epochs)
    ]
    figure = history_figure(rows, "small")
    for axes, label in zip(figure.axes, ("loss", "accuracy, pixel accuracy"), strict=True):
        assert ticks(axes, "x") == labels
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", label)


def test_epochs_without_evaluation_leave_a_panel_empty() -> None:
    figure = history_figure([{"epoch": 1, "train/loss": 1.0}], "small")
    assert ticks(figure.axes[0], "x") == ["1"]
    assert figure.axes[1].lines[:] == []


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ((0.52, 2.4), ["0.6", "1", "1.5", "2"]),
        ((1.2, 21.0), ["2", "5", "10", "20"]),
        ((0.002, 30.0), ["0.01", "0.1", "1", "10"]),
        ((2e-5, 3e-3), ["2e-5", "5e-5", "1e-4", "2e-4", "5e-4", "0.001", "0.002"]),
        ((2e3, 2e5), ["2000", "5000", "10000", "20000", "50000", "1e5", "2e5"]),
    ],
)
def test_logarithmic_axes_have_plain_numbers(values: tuple[float, float], labels: list[str]) -> None:
    axes = Figure().subplots()
    axes.plot([1, 2], values)
    axes.set_yscale("log")
    axes.set_ylim(*values)
    tidy(axes)
    assert ticks(axes, "y") == labels


def test_powers_of_two_and_ticks_of_ones_own() -> None:
    axes = Figure().subplots()
    axes.plot([16, 64], [0.01, 0.3])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_yticks([0.03, 0.1], ["a", "b"])
    tidy(axes)
    assert ticks(axes, "x") == ["16", "32", "64"]
    assert ticks(axes, "y") == ["a", "b"]


def test_lines_do_not_strike_through_the_legend() -> None:
    axes = Figure().subplots()
    axes.plot([1, 2], label="one")
    axes.legend(frameon=False)
    tidy(axes)
    legend = axes.get_legend()
    assert legend is not None and legend.get_frame_on()
    assert legend.get_frame().get_facecolor() == (1.0, 1.0, 1.0, 0.85)


def test_numbers_below_rounding_are_zero() -> None:
    assert regression_report._percent(-3.3e-16) == "0 %"
    assert regression_report._percent(7.8e-7) == "7.8e-05 %"
    assert results._duration(0.02) == "1 s"
    assert results._duration(1.25) == "1.2 minutes"


def test_the_page_of_inspect_is_wide_and_its_filters_are_labelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    set_title = Axes.set_title

    def noted(self: Axes, text: str, *args: object, **options: object) -> object:
        drawn.append(text)
        return set_title(self, text, *args, **options)

    monkeypatch.setattr(Axes, "set_title", noted)
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    net = torch.nn.Sequential(calibrate(WhitenedConv2d(3, 10, 3), images)).eval()
    write(tmp_path, "title", "line", net, inspect_layers(net, images), {})
    assert '<main class="wide">' in (tmp_path / "inspect.html").read_text()
    assert [text for text in drawn if text.startswith("whitening")] == [
        f"whitening\n{colour}" for colour in ("red", "green", "blue")
    ]
    strongest = net[0].folded()[0].square().sum((1, 2, 3)).argsort(descending=True).tolist()
    assert [text for text in drawn if text.startswith("filter")] == [f"filter {i}" for i in strongest]
