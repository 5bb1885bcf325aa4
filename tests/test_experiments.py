"""What the experiments that train and count say, on results written by hand, and their parts against hand counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from netdeconv import WhitenedConv2d, WhitenedLinear, WhiteningConfig
from netdeconv.cli import main
from netdeconv.lab import train
from netdeconv.lab.experiments import comparison, cost
from netdeconv.lab.experiments.cost_flops import Convolution, convolutions, whitening_flops
from netdeconv.lab.experiments.registry import EXPERIMENTS, load
from netdeconv.lab.experiments.results import carry_out
from netdeconv.lab.progress import Progress, quiet_lightning
from netdeconv.lab.train import Record, Training, run_trainings
from netdeconv.lab.workspace import Workspace


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_explains_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert load(name).name == name
    assert main(["reproduce", name, "--help"]) == 0
    assert f"options of {name}" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- operations


def counted(layer: nn.Module, x: torch.Tensor) -> float:
    """What torch's own counter finds in a training step."""
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
        y.backward(torch.ones_like(y))
    return counter.get_total_flops()


LAYER = Convolution(channels=8, outputs=12, kernel=3, stride=1, padding=1, groups=1, size=6)


def test_a_plain_convolution_is_counted_as_torch_counts_it() -> None:
    assert counted(LAYER.plain(), torch.randn(4, 8, 6, 6, requires_grad=True)) == LAYER.flops(4)
    # torch's counter errs in the backward of grouped convolutions, so only the forward, a third, is held beside it
    grouped = Convolution(channels=8, outputs=4, kernel=3, stride=2, padding=1, groups=2, size=8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        grouped.plain()(torch.randn(4, 8, 8, 8))
    assert counter.get_total_flops() == grouped.flops(4) / 3


@pytest.mark.parametrize("block", [8, 4])
def test_the_published_procedure_is_counted_as_torch_counts_it(block: int) -> None:
    # The counts differ by the few products at the ends of the recurrence whose gradients are not needed.
    x = torch.randn(24, 8, 6, 6, requires_grad=True)
    layer = LAYER.whitened(WhiteningConfig.paper(block_size=block))
    own = sum(whitening_flops(layer, x.detach()).values())
    assert counted(layer, x) - LAYER.flops(24) == pytest.approx(own, rel=0.1)


def test_the_parts_by_hand() -> None:
    x = torch.randn(4, 8, 6, 6)
    published = whitening_flops(LAYER.whitened(WhiteningConfig.paper(block_size=4)), x)
    # 4 images at 2x2 positions; two blocks of 36 features share one root
    assert published["moments"] == 3 * 2 * 16 * 2 * 36**2
    assert published["root"] == 3 * 2 * 12 * 36**3
    assert published["fold"] == 3 * 2 * 12 * 2 * 36**2
    default = whitening_flops(LAYER.whitened(WhiteningConfig()), x)
    assert default["root"] == 2 * 3 * 72**3 / 16
    assert default["fold"] == 2 * 2 * 12 * 72**2 + (1 + 7) * x.numel()  # the mean, and the variance of the channels
    unscaled = whitening_flops(LAYER.whitened(WhiteningConfig(scale=False)), x)
    assert unscaled["fold"] == 2 * 2 * 12 * 72**2 + x.numel()


@pytest.mark.parametrize(
    ("options", "products"),
    [
        ({"num_iters": 1}, 0), ({"num_iters": 2}, 2), ({"num_iters": 5}, 6), ({"num_iters": 7}, 18),
        ({"num_iters": 15}, 17), ({"num_iters": 2, "solver": "newton_schulz"}, 3),
    ],
)  # fmt: skip
def test_the_products_of_the_root_are_counted_as_torch_counts_them(options: dict[str, Any], products: int) -> None:
    layer = LAYER.whitened(WhiteningConfig(update_every=1, **options))
    assert whitening_flops(layer, torch.randn(4, 8, 6, 6))["root"] == 2 * products * 72**3
    with FlopCounterMode(display=False) as counter:
        layer.whitening.estimator.root_of(torch.eye(72))
    # The recurrence's sums of a few matrices are no products of n x n, but torch may make one of them.
    assert counter.get_total_flops() == pytest.approx(2 * products * 72**3, rel=0.1, abs=0)


def test_a_smaller_last_block_has_its_own_root() -> None:
    config = WhiteningConfig(block_size=4, num_iters=5)
    flops = whitening_flops(WhitenedConv2d(10, 4, 1, whitening=config), torch.randn(2, 10, 3, 3))
    assert flops["root"] == 2 * 6 * (4**3 + 2**3) / 16
    assert flops["fold"] == 2 * 2 * 4 * (2 * 4**2 + 2**2) + 8 * 180


def test_layers_of_a_network_are_found_with_their_maps() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), *(nn.Conv2d(4, 4, 1) for _ in range(2)))
    assert [(one.name, one.count) for one in convolutions(net, 8)] == [
        ("3 to 4, 3x3, map 8", 1), ("4 to 4, 1x1, map 4", 2)
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- trials


def run_of(norm: str, rate: float, accuracy: float, **changes: Any) -> dict[str, Any]:
    plain = {"dataset": "digits", "network": "mlp", "width": 1.0, "epochs": 2, "steps": 10, "batch_size": 8, "seed": 0}
    curves = {"test/accuracy": [accuracy / 2, accuracy], "train/loss": [2.0, 1.0]}
    more = {"weight_decay": 0.0, "whitening": {}, "seconds_per_step": 0.01, "curves": curves}
    return {**plain, **more, "norm": norm, "rate": rate, **changes}


def test_the_best_rate_is_that_of_the_mean_over_seeds() -> None:
    runs = [run_of("bn", 0.1, 0.9), run_of("bn", 0.1, 0.1, seed=1), run_of("bn", 0.02, 0.6)]
    assert comparison.best_rate(runs) == 0.02
    assert comparison.accuracy_cell(comparison.by_rate(runs)[0.1]) == "50.0 ± 56.6 %"


def test_more_seeds_do_not_change_the_rate() -> None:
    """By the mean over seeds 0.02 would be best; by the one seed that both rates have, 0.1 is."""
    runs = [run_of("bn", 0.1, 0.7, seed=3), run_of("bn", 0.02, 0.6, seed=3), run_of("bn", 0.1, 0.3, seed=4)]
    assert [run["seed"] for run in comparison.tuned(runs)] == [3, 4]
    assert comparison.best_rate(runs) == 0.02
    assert shown("mlp", runs).tables[0].rows[0][1] == "0.1"
    alone = run_of("bn", 0.02, 0.9, seed=0)  # the other rate has no such seed
    assert comparison.tuned([alone, *runs]) == [runs[0], runs[2]]


def test_a_run_that_is_not_finite_counts_nothing() -> None:
    assert comparison.finals([run_of("bn", 0.1, 0.5, curves={"test/accuracy": [None]})]) == [0]


def test_the_perceptron_is_the_papers() -> None:
    net = train.mlp(784, 10)
    assert [tuple(m.weight.shape) for m in net if isinstance(m, nn.Linear)] == [(128, 784), (128, 128), (10, 128)]


def shown(name: str, runs: list[Mapping[str, Any]]) -> Any:
    return load(name).present({"runs": runs})


def test_mlp_says_what_its_numbers_say() -> None:
    found = shown("mlp", [run_of("bn", 0.1, 0.8), run_of("bn", 0.5, 0.7), run_of("nd", 0.1, 0.85)])
    assert [row[:4] for row in found.tables[0].rows] == [
        ["scikit-learn's digits, BatchNorm", "0.1", "40.0 %", "80.0 %"],
        ["scikit-learn's digits, ND", "0.1", "42.5 %", "85.0 %"],
    ]


def test_batch_size_says_what_its_numbers_say() -> None:
    small = [run_of("bn", 0.1, 0.5), run_of("bn", 0.2, 0.6), run_of("nd", 0.1, 0.7)]
    large = [run_of("bn", 0.1, 0.8, batch_size=64), run_of("nd", 0.1, 0.75, batch_size=64)]
    assert [row[:4] for row in shown("batch-size", large + small).tables[0].rows] == [
        ["8, BatchNorm", "10", "0.2", "60.0 %"], ["8, ND", "10", "0.1", "70.0 %"],
        ["64, BatchNorm", "10", "0.1", "80.0 %"], ["64, ND", "10", "0.1", "75.0 %"],
    ]  # fmt: skip


def test_ablation_says_what_its_numbers_say() -> None:
    runs = [run_of("nd", 0.1, 0.60), run_of("nd", 0.1, 0.62, seed=1), run_of("bn", 0.02, 0.5)]
    runs += [run_of("nd", 0.1, 0.61, whitening={"scale": False}), run_of("nd", 0.1, 0.61, whitening={"block_size": 8})]
    runs += [run_of("nd", 0.1, 0.62, whitening={"eps": 0.1}), run_of("nd", 0.1, 0.4, whitening={"num_iters": 15})]
    found = shown("ablation", runs)
    rows = {row[0]: row[3:5] for row in found.tables[0].rows}
    assert rows["default"] == ["61.0 ± 1.4 %", ""] and rows["BatchNorm, rate 0.02"] == ["50.0 %", "-11.0"]
    assert rows["iterations 15 (default 3)"] == ["40.0 %", "-21.0"]
    assert "standard deviation of 1.4 points" in found.tables[0].note
    names = [row[0] for row in found.tables[0].rows]
    assert names[2:] == [
        "scaled channels False (default True)", "block size 8 (default 32, in wide layers 16)",
        "eps 0.1 (default 1e-05)", "iterations 15 (default 3)",
    ]  # fmt: skip


def test_the_ablation_varies_what_the_default_is() -> None:
    from netdeconv.lab.experiments.ablation import _VARIATIONS, _defaults

    for name, values in _VARIATIONS.items():
        assert _defaults()[name] not in values
        for value in values:
            WhitenedConv2d(4, 4, 3, whitening=WhiteningConfig(**{name: value}))
            WhitenedLinear(4, 4, whitening=WhiteningConfig(**{name: value}))


def test_a_trial_of_few_steps_takes_so_many(tmp_path: Path) -> None:
    training = Training(dataset="digits", network="small", norm="nd", rate=0.1, steps=3, batch_size=16)
    published: list[list[float]] = []
    workspace = Workspace(
        tmp_path,
        code=(),
        progress=Progress(show=False),
        publish=lambda result: published.append([run["rate"] for run in result["runs"]]),
    )
    with quiet_lightning():
        _, found = run_trainings([training], workspace, before=[{"rate": 0.02}])["runs"]
    assert published == [[0.02, 0.1]]
    assert found["steps"] == 3
    assert len(found["curves"]["test/accuracy"]) == 1


def test_trials_of_other_processes_come_last_and_are_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = [Training(dataset="digits", network="small", norm="nd", rate=rate) for rate in (0.1, 0.2, 0.3)]
    trained, published = [], []
    workspace = Workspace(
        tmp_path,
        code=(),
        progress=Progress(show=False),
        publish=lambda result: published.append([run["rate"] for run in result["runs"]]),
    )

    def at_once(training: Training, *_: Any) -> Record:
        trained.append(training.rate)
        if training.rate == 0.2:  # meanwhile another process finishes the first
            other.release()
            elsewhere.part(plan[0].name, plan[0].settings(), lambda: dataclasses.asdict(record(1)))
        return record(2)

    def record(by: int) -> Record:
        return Record(curves={}, steps=by, parameters=0)

    elsewhere = Workspace(tmp_path, code=(), progress=Progress(show=False))
    other = FileLock(workspace.path(plan[0].name, plan[0].settings(), "lock"))
    Path(other.lock_file).parent.mkdir()
    other.acquire()
    monkeypatch.setattr(train, "train", at_once)
    found = run_trainings(plan, workspace)["runs"]
    assert trained == [0.2, 0.3]
    assert published == [[0.1, 0.2], [0.1, 0.2, 0.3]]
    assert [run["steps"] for run in found] == [1, 2, 2]
    # A second start, if it is stopped, has not put these three in the place of all that an experiment has published.
    assert run_trainings(plan, workspace)["runs"] == found
    assert published == [[0.1, 0.2], [0.1, 0.2, 0.3]]


def test_a_second_start_of_cost_publishes_no_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published: list[int] = []
    monkeypatch.setattr(cost, "_measure", lambda *_: {})
    for _ in range(2):
        workspace = Workspace(
            tmp_path,
            code=(),
            progress=Progress(show=False),
            publish=lambda result: published.append(len(result["layers"])),
        )
        layers = cost.run(load("cost").sizes["smoke"], workspace)["layers"]
    assert published == [number + 1 for number in range(len(layers))]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "regression"])
def test_the_smoke_size_needs_no_data(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NETDECONV_DATA", raising=False)
    experiment = load(name)
    outcome = carry_out(experiment, experiment.sizes["smoke"], tmp_path, command="", size="smoke", show=False)
    assert outcome.record["complete"]
    pictures = {f"{picture.name}.png" for picture in outcome.presentation.figures}
    assert pictures == {path.name for path in outcome.folder.glob("*.png")}
