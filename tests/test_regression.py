"""Gradient descent on linear models: against the closed form, by hand and on digits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from netdeconv.lab.experiments.registry import load
from netdeconv.lab.experiments.regression import Quadratic, descend, iterations_to, optimum, quadratic, transformed
from netdeconv.lab.experiments.results import carry_out

_ROUNDING = 1e-12  # of sums of a few hundred products in float64


def test_descent_by_hand() -> None:
    # L = (4 w1^2 + w2^2) / 2 - 4 w1 - w2 + 3: optimum w = (1, 1), L = 1/2; rate 1/4 leaves 0 and 3/4 of the errors
    problem = Quadratic(torch.tensor([4.0, 1.0]).diag().double(), torch.tensor([[4.0], [1.0]]).double(), 3.0)
    expected = [3.0] + [0.5 + 0.5 * 0.75 ** (2 * k) for k in (1, 2, 3)]
    assert descend(problem, 0.25, 3) == pytest.approx(expected, rel=_ROUNDING)
    assert iterations_to(problem, 0.25, 0.5 + 0.5 * 0.75**6) == 3
    assert iterations_to(problem, 0.25, 0.5 + 0.49 * 0.75**6) == 4
    assert iterations_to(problem, 0.25, 0.4) is None


def test_the_loss_is_that_of_the_model_with_bias() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y, w = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((50, 4), (50, 3), (5, 3)))
    direct = (x @ w[:4] + w[4] - y).square().sum() / 100
    assert quadratic(x, y).loss(w) == pytest.approx(float(direct), rel=_ROUNDING)


def test_counted_iterations_are_those_of_the_descent() -> None:
    draw = torch.Generator().manual_seed(1)
    x, y = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((80, 6), (80, 2)))
    problem = quadratic(x * torch.logspace(0, -1, 6, dtype=torch.float64) + 0.5, y)
    rate = 1 / float(torch.linalg.eigvalsh(problem.gram)[-1])
    losses = descend(problem, rate, 400)
    target = losses[-1] * 1.01
    assert iterations_to(problem, rate, target) == next(k for k, loss in enumerate(losses) if loss <= target)


def test_transformed_input_and_optimum_are_those_of_the_data_itself() -> None:
    draw = torch.Generator().manual_seed(2)
    x, y = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((90, 5), (90, 2)))
    x = torch.cat([x + 3, torch.full_like(x[:, :1], 0.7)], dim=1)  # a constant pixel: singular next to the bias
    mean, matrix = x.mean(0), torch.randn(6, 6, generator=draw, dtype=torch.float64)
    direct, moved = quadratic((x - mean) @ matrix, y), transformed(quadratic(x, y), mean, matrix)
    # the sums that cancel are of squares of numbers up to 6
    torch.testing.assert_close(moved.gram, direct.gram, rtol=0, atol=1e-11)
    torch.testing.assert_close(moved.cross, direct.cross, rtol=0, atol=1e-11)
    design = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    solution = torch.linalg.lstsq(design, y, driver="gelsd").solution
    assert optimum(quadratic(x, y)) == pytest.approx(float((design @ solution - y).square().sum() / 180), rel=1e-9)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    experiment = load("regression")
    settings = dataclasses.replace(experiment.sizes["smoke"], iterations=50, logistic_iterations=3)
    outcome = carry_out(experiment, settings, tmp_path_factory.mktemp("regression"), command="", show=False)
    return {**outcome.record["result"], "folder": outcome.folder}


@pytest.mark.training
def test_white_input_arrives_in_one_iteration(digits: dict) -> None:
    optimum, inputs = digits["optimum"], digits["inputs"]
    assert inputs["exact"]["losses"][1] <= 1.01 * optimum
    assert inputs["exact"]["iterations"] == inputs["steps15"]["iterations"] == 1
    assert inputs["raw"]["losses"][1] > 1.5 * optimum  # the test can fail
    assert 1.01 * optimum < inputs["steps5"]["losses"][1]  # five steps do not whiten
    assert all(loss >= optimum * (1 - _ROUNDING) for one in inputs.values() for loss in one["losses"])


@pytest.mark.training
def test_the_layer_takes_the_same_step(digits: dict) -> None:
    # the layer adds eps to the same covariance in float64, so that only rounding differs
    assert digits["layer"] == pytest.approx(digits["inputs"]["exact"]["losses"][1], rel=1e-9)


def test_pictures_are_drawn(digits: dict) -> None:
    folder = digits["folder"]
    assert isinstance(folder, Path)
    assert {path.name for path in folder.glob("*.png")} == {"regression-loss.png", "regression-eigenvalues.png"}


