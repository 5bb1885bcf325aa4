"""Experiments on what whitening looks like, and those that train by the command fit: small runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from netdeconv import ConfigError
from netdeconv.cli import main
from netdeconv.lab import train
from netdeconv.lab.data import DigitsData
from netdeconv.lab.experiments import trained
from netdeconv.lab.experiments.by_recipe import Measure, present_compared
from netdeconv.lab.experiments.experiment import Experiment, Presentation
from netdeconv.lab.experiments.registry import load
from netdeconv.lab.experiments.results import Outcome, carry_out
from netdeconv.lab.plots import png
from netdeconv.lab.tasks import Classification
from test_resume import interrupt, stop_at, terminate
from variation import Variation


def carried_out(name: str, out: Path, **changes: Any) -> Outcome:
    experiment: Experiment = load(name)
    settings = dataclasses.replace(experiment.sizes["smoke"], **changes)
    return carry_out(experiment, settings, out, command=f"netdeconv reproduce {name}", thread_count=1, show=False)


def test_filters_of_photographs_have_a_centre_and_a_surround(tmp_path: Path) -> None:
    outcome = carried_out("filters", tmp_path, sizes=(5,), stride=10)
    found = {(one["colours"], one["root"]): one for one in outcome.record["result"]["filters"]}
    assert len(found) == 8
    for colours in ("colour", "grey"):
        exact, five, zca = (found[colours, root] for root in ("exact", "steps5", "zca"))
        assert exact["fit"]["r2"] > 0.95 > exact["fit"]["r2_centre_only"]
        assert exact["negative_share"] > 0.8
        assert five["peak"] < exact["peak"] <= zca["peak"]
    assert found["colour", "steps5"]["negative_share"] < 0.5
    assert (tmp_path / "filters" / "filters-photographs-grey.png").is_file()


@pytest.fixture
def moved_digits(variation: Variation, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digits are those that the tests of training are to be run on."""
    setup = DigitsData.setup

    def moved(self: DigitsData, stage: str | None = None) -> None:
        if not self.parts:
            setup(self, stage)
            self.parts = {part: (variation.moved(x), labels) for part, (x, labels) in self.parts.items()}

    monkeypatch.setattr(DigitsData, "setup", moved)


@pytest.mark.training
@pytest.mark.usefixtures("moved_digits")
def test_networks_are_trained_once_for_both_experiments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variation: Variation
) -> None:
    correlation = carried_out("correlation", tmp_path, seed=variation.seed)
    monkeypatch.setattr(trained, "train", lambda *_, **__: pytest.fail("trained again"))
    sparsity = carried_out("sparsity", tmp_path, seed=variation.seed)
    networks = correlation.record["result"]["networks"]
    for layer in networks["nd"]["layers"]:
        assert layer["after"]["correlation"] < layer["before"]["correlation"]
    assert all(layer["after"] is None for layer in networks["bn"]["layers"])
    assert [layer["name"] for layer in networks["bn"]["layers"]] == ["conv1", "conv2", "conv3", "head"]
    assert networks["nd"]["layers"][1]["taps"] == 9 and len(networks["nd"]["layers"][1]["after"]["matrix"]) == 72
    result = sparsity.record["result"]
    assert result["networks"]["nd"]["accuracy"] == networks["nd"]["accuracy"] > 0.8
    (five, exact) = (one["whitened"]["kurtosis"] for one in result["photographs"])
    assert result["photographs"][0]["raw"]["kurtosis"] < 3 < five < exact
    for outcome in (correlation, sparsity):
        assert len(list(outcome.folder.glob("*.png"))) == 2


def test_the_command_fit_trains_what_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = carried_out("imagenet", tmp_path, network="small", bn_rates=(0.1, 0.02))
    runs = outcome.record["result"]["runs"]
    assert [(run["norm"], run["rate"]) for run in runs] == [("bn", 0.1), ("bn", 0.02), ("nd", 0.1)]
    assert all(math.isfinite(run["curves"]["train/loss"][0]) and run["parameters"] > 1000 for run in runs)
    assert len(list((tmp_path / "imagenet" / "fits").glob("*/checkpoints/last.ckpt"))) == 3
    assert outcome.presentation.tables[1].rows[0][:2] == ["vgg11", "no normalisation"]
    # What is finished is found again, though its images were generated anew and in another place.
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("trained again"))
    again = carried_out("imagenet", tmp_path, network="small", bn_rates=(0.1, 0.02))
    assert again.record["result"]["runs"] == runs


def test_a_training_by_a_recipe_goes_on_within_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"network": "small", "epochs": 2, "batch_size": 16, "nd_rates": (0.1,)}
    whole = carried_out("imagenet", tmp_path / "whole", **settings)
    steps = [run["steps"] for run in whole.record["result"]["runs"]]
    real = Classification.training_step
    done: list[int] = []

    def stopping(self: Classification, *args: Any) -> Any:
        done.append(self.current_epoch)
        if len(done) == stop:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(Classification, "training_step", stopping)
    stop = steps[0] // 2 + 1  # in the second epoch of the first training
    with pytest.raises(KeyboardInterrupt):
        carried_out("imagenet", tmp_path / "stopped", **settings)
    assert done[-1] == 1
    done.clear()
    stop = 0
    again = carried_out("imagenet", tmp_path / "stopped", **settings)
    assert len(done) == sum(steps) - steps[0] // 2
    assert again.record["result"] == whole.record["result"]


@pytest.mark.parametrize(("stop", "code"), [(interrupt, 130), (terminate, 143)])
@pytest.mark.parametrize("name", ["imagenet", "mlp"])  # by a recipe, and by a trainer of its own
def test_a_stopped_training_says_once_how_it_goes_on(
    name: str,
    stop: Callable[[], None],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_at(monkeypatch, "training_step", 2, stop)
    options = ["--network", "small"] if name == "imagenet" else []
    assert main(["reproduce", name, "--size", "smoke", "--out", str(tmp_path), "--quiet", *options]) == code
    expected = f"Stopped. Finished parts are kept; the same command goes on from {tmp_path}."
    assert capsys.readouterr().err.strip() == expected


def test_a_training_that_diverges_is_a_result_as_well(tmp_path: Path) -> None:
    outcome = carried_out("imagenet", tmp_path, network="small", bn_rates=(1e30,), nd_rates=(0.1,))
    diverged, other = outcome.record["result"]["runs"]
    assert (diverged["rate"], other["rate"]) == (1e30, 0.1)
    assert None in (diverged["curves"]["train/loss"] + diverged["curves"]["validation/loss"])
    assert len(other["curves"]["train/loss"]) == 1 and None not in other["curves"]["train/loss"]
    assert "diverged" in outcome.presentation.tables[0].rows[0]


def test_data_that_are_not_there_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETDECONV_DATA", str(tmp_path))
    with pytest.raises(ConfigError, match=r"expected data in .*streets, there is no such folder"):
        carried_out("cityscapes", tmp_path, data="streets")


def presented(*runs: tuple[str, float, float]) -> Presentation:
    """Of trainings by norm, rate and the measure after the last epoch; a loss that is not finite where that is 0."""
    result = {
        "runs": [
            {
                "norm": norm,
                "rate": rate,
                "seed": seed,
                "curves": {
                    "train/loss": [1.0, 1.0 if score else None],
                    "validation/loss": [None, 2.0],
                    "validation/miou": [None, score],
                },
            }
            for seed, (norm, rate, score) in enumerate(runs)
        ],
    }
    return present_compared(result, Measure("validation/miou", "mIoU"), note="", name="x")


def test_results_of_the_version_before_are_shown_as_well() -> None:
    rows = [{"epoch": 1.0, "train/loss": 2.0}]
    rows.append({"epoch": 2.0, "train/loss": 1.0, "validation/loss": 2.0, "validation/miou": 0.25})
    runs = [{"norm": norm, "rate": 0.1, "seed": 0, "epochs": rows} for norm in ("bn", "nd")]
    before = present_compared({"runs": runs}, Measure("validation/miou", "mIoU"), note="", name="x")
    assert before.tables[0] == presented(("bn", 0.1, 0.25), ("nd", 0.1, 0.25)).tables[0]
    before.figures[0].draw(figure := Figure())
    assert [list(line.get_xdata()) for line in figure.axes[1].lines] == [[2], [2]]


def test_seeds_are_averaged_and_divergence_is_shown() -> None:
    found = presented(("bn", 0.1, 0.2), ("bn", 0.1, 0.3), ("nd", 0.1, 0.0))
    assert [list(row[3:]) for row in found.tables[0].rows] == [
        ["25.0 ± 7.1 %", "2.000", "1.000"], ["0.0 %", "2.000", "diverged"]
    ]  # fmt: skip
    figure = Figure()
    found.figures[0].draw(figure)
    assert png(figure).startswith(b"\x89PNG")
    (_, score) = figure.axes
    assert list(score.lines[0].get_xdata()) == [2]  # the only epoch that was evaluated
