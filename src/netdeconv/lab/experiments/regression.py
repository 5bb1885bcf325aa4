"""Linear models by gradient descent: raw, standardised and whitened input, and what the closed form reaches.

With ``G = X^T X / N`` and ``B = X^T Y / N`` the loss ``|X W - Y|^2 / 2N`` of a linear model is a parabola, and gradient
descent ``W <- W - rate (G W - B)`` multiplies the error along each eigenvector of G by ``1 - rate * eigenvalue``. White
input has ``G = I``: one step of rate 1 arrives. A column of ones in X, next to centred input, makes the bias a weight
like the others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from netdeconv import WhitenedLinear, WhiteningConfig
from netdeconv.functional import inverse_sqrt
from netdeconv.lab.data import create_data
from netdeconv.lab.experiments.experiment import Experiment
from netdeconv.lab.experiments.regression_report import (
    INPUTS,
    LEAST_SQUARES_RATES,
    LOGISTIC_RATES,
    NEAR,
    present,
)
from netdeconv.lab.options import check_fields, option
from netdeconv.lab.workspace import Workspace

__all__ = ["EXPERIMENT", "RegressionSettings", "descend", "iterations_to", "optimum", "quadratic", "transformed"]

_SINGULAR = 1e-12  # share of the largest eigenvalue below which a direction has no variance but rounding


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegressionSettings:
    """What is regressed."""

    dataset: str = option("fashion_mnist", "data set", choices=("digits", "mnist", "fashion_mnist"))
    eps: float = option(1e-5, "added to the covariance's diagonal; pixels are 0 to 1")
    iterations: int = option(1000, "iterations of gradient descent on the L2 loss")
    logistic_iterations: int = option(50, "the same on the logistic loss")

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class Quadratic:
    """The L2 loss as a function of W alone: ``L(W) = tr(W^T G W) / 2 - tr(W^T B) + constant``, in float64."""

    gram: Tensor
    cross: Tensor
    constant: float

    def loss(self, w: Tensor) -> float:
        return float((w * (0.5 * self.gram @ w - self.cross)).sum()) + self.constant


def quadratic(x: Tensor, y: Tensor) -> Quadratic:
    """The L2 loss of inputs ``(N, D)`` and targets ``(N, K)``, with a bias as last row of W."""
    x = _with_ones(x)
    return Quadratic(x.T @ x / len(x), x.T @ y / len(x), float(y.square().sum() / (2 * len(x))))


def descend(problem: Quadratic, rate: float, iterations: int) -> list[float]:
    """Loss at W = 0 and after every iteration of gradient descent."""
    w = torch.zeros_like(problem.cross)
    losses = [problem.loss(w)]
    for _ in range(iterations):
        w = w - rate * (problem.gram @ w - problem.cross)
        losses.append(problem.loss(w))
    return losses


def optimum(problem: Quadratic) -> float:
    """The lowest loss, in closed form: along each eigenvector of G the parabola's lowest point."""
    return problem.constant - float(_gains(problem)[1].sum())


def _gains(problem: Quadratic) -> tuple[Tensor, Tensor]:
    """Eigenvalues of G, and how much the loss falls along each eigenvector; nothing along those without variance."""
    values, vectors = torch.linalg.eigh(problem.gram)
    values = values.clamp(min=0)
    along = (vectors.T @ problem.cross).square().sum(1)
    seen = values > _SINGULAR * values[-1]
    return values, torch.where(seen, along / (2 * values.clamp(min=1e-300)), torch.zeros_like(along))


def iterations_to(problem: Quadratic, rate: float, target: float) -> int | None:
    """Iterations until the loss is at most ``target``, from the eigenvalues of G; ``None`` for over a billion."""
    values, gain = _gains(problem)

    def loss(k: int) -> float:
        left = (1 - rate * values).abs().pow(2 * k)
        return problem.constant - float((gain * (1 - left)).sum())

    low, high = 0, 10**9
    if loss(high) > target:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if loss(middle) <= target else (middle + 1, high)
    return low


def _load(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images ``(N, D)`` with values 0 to 1 and labels, then test images and labels."""
    data: Any = create_data(name, **({} if name == "digits" else {"image_size": 28}))
    data.setup()
    parts = [data.parts[part] for part in ("train", "test")]
    low, high = (float(f(parts[0][0])) for f in (torch.min, torch.max))
    (train, labels), (test, test_labels) = (((x.double().flatten(1) - low) / (high - low), y) for x, y in parts)
    return train, labels, test, test_labels


def transformed(problem: Quadratic, mean: Tensor, matrix: Tensor) -> Quadratic:
    """The loss for the input ``(x - mean) matrix``, from that for x: with ones, ``(x, 1) -> (x, 1) T``."""
    t = torch.eye(len(problem.gram), dtype=problem.gram.dtype)
    t[:-1, :-1], t[-1, :-1] = matrix, -mean @ matrix
    return Quadratic(t.T @ problem.gram @ t, t.T @ problem.cross, problem.constant)


def _moments(problem: Quadratic) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the input, which G holds: its last row is the mean, as of a column of ones."""
    mean = problem.gram[-1, :-1]
    return mean, problem.gram[:-1, :-1] - mean.outer(mean)


def _transforms(mean: Tensor, cov: Tensor, eps: float) -> dict[str, tuple[Tensor, Tensor]]:
    """For every kind of input the mean that is subtracted and the matrix that follows."""
    identity = torch.eye(len(cov), dtype=cov.dtype)
    cov = cov + eps * identity
    return {
        "raw": (torch.zeros_like(mean), identity),
        "standardised": (mean, torch.diag(1 / cov.diagonal().sqrt())),
        "exact": (mean, inverse_sqrt(cov, solver="eigh")),
        "steps15": (mean, inverse_sqrt(cov, num_iters=15, solver="newton_schulz")),
        "steps5": (mean, inverse_sqrt(cov, num_iters=5, solver="newton_schulz")),
    }


def _least_squares(settings: RegressionSettings) -> dict[str, Any]:
    x, labels, *_ = _load(settings.dataset)
    targets = F.one_hot(labels).double()
    raw = quadratic(x, targets)
    mean, cov = _moments(raw)
    spectrum = torch.linalg.eigvalsh(cov).clamp(min=0)
    lowest = optimum(raw)
    found: dict[str, Any] = {
        "images": len(x),
        "pixels": x.shape[1],
        "optimum": lowest,
        "constant_model": float((targets - targets.mean(0)).square().sum() / (2 * len(x))),
        "spectrum": {"largest": float(spectrum[-1]), "smallest": float(spectrum[0])},
        "below_eps": int((spectrum < settings.eps).sum()),
        "constant_pixels": int((x.amax(0) == x.amin(0)).sum()),
        "inputs": {},
    }
    for name, (centre, matrix) in _transforms(mean, cov, settings.eps).items():
        problem = transformed(raw, centre, matrix)
        values = torch.linalg.eigvalsh(problem.gram)
        # Whitened input has a rate of its own, 1; the others get the best of a few.
        scaled = [factor / float(values[-1]) for factor in LEAST_SQUARES_RATES]
        rates = scaled if name in ("raw", "standardised") else [1.0]
        runs = [(descend(problem, rate, settings.iterations), rate) for rate in rates]
        losses, rate = min(runs, key=lambda run: run[0][-1])
        found["inputs"][name] = {
            "rate": rate,
            "losses": losses,
            "iterations": iterations_to(problem, rate, (1 + NEAR) * lowest),
            "eigenvalues": values.flip(0).tolist(),
        }
    found["layer"] = _step_of_the_layer(x, targets, settings.eps)
    return found


def _step_of_the_layer(x: Tensor, targets: Tensor, eps: float) -> float:
    """Loss after one step of SGD with rate 1 on the library's own layer, from weights and bias of zero."""
    config = WhiteningConfig(solver="eigh", eps=eps, block_size=x.shape[1], differentiable=True, max_samples=None)
    layer = WhitenedLinear(x.shape[1], targets.shape[1], dtype=x.dtype, whitening=config)
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    loss = (layer(x) - targets).square().sum() / (2 * len(x))
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        return float((layer(x) - targets).square().sum() / (2 * len(x)))


def _logistic(settings: RegressionSettings, kind: str) -> dict[str, Any]:
    """Cross entropy, full batch, from W = 0, in float32; of a few rates the one with the lowest loss at the end.

    All rates are run together, as products with one wide matrix.
    """
    x, labels, test, test_labels = _load(settings.dataset)
    mean, matrix = _transforms(*_moments(quadratic(x, x[:, :1])), settings.eps)[kind]
    x, test = (_with_ones((part - mean) @ matrix).float() for part in (x, test))
    targets = F.one_hot(labels).float()
    rates = torch.tensor(LOGISTIC_RATES) / float(torch.linalg.eigvalsh(x.T @ x / len(x))[-1])
    w = last = torch.zeros(x.shape[1], len(rates), targets.shape[1])
    history = []
    for _ in range(settings.logistic_iterations + 1):
        scores = (x @ w.flatten(1)).view(len(x), *w.shape[1:])
        history.append([float(F.cross_entropy(one, labels)) for one in scores.unbind(1)])
        errors = scores.softmax(2).sub_(targets.unsqueeze(1))
        last, w = w, w - rates.unsqueeze(1) * (x.T @ errors.flatten(1)).view_as(w) / len(x)
    best = min(range(len(rates)), key=lambda i: history[-1][i] if math.isfinite(history[-1][i]) else math.inf)
    accuracy = float(((test @ last[:, best]).argmax(1) == test_labels).double().mean())
    return {"rate": float(rates[best]), "losses": [losses[best] for losses in history], "accuracy": accuracy}


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)


def run(settings: RegressionSettings, workspace: Workspace) -> Mapping[str, Any]:
    """The L2 loss, then the logistic loss for each kind of input."""
    workspace.progress.expect(1 + len(INPUTS))
    plain = dataclasses.asdict(settings)
    squares = {key: plain[key] for key in ("dataset", "eps", "iterations")}
    logistic = {key: plain[key] for key in ("dataset", "eps", "logistic_iterations")}
    found = {**workspace.part("least-squares", squares, lambda: _least_squares(settings)), "settings": plain}
    found["logistic"] = {
        kind: workspace.part(f"logistic-{kind}", logistic, lambda kind=kind: _logistic(settings, kind))  # type: ignore[misc]
        for kind in INPUTS
    }
    return found


EXPERIMENT = Experiment(
    name="regression",
    claim="With L2 loss on a linear model, whitened input lets gradient descent converge in one iteration.",
    source="abstract",
    sizes={
        "smoke": RegressionSettings(dataset="digits", iterations=200, logistic_iterations=20),
        "small": RegressionSettings(),
        "paper": RegressionSettings(iterations=10000, logistic_iterations=300),
    },
    run=run,
    present=present,
    devices=("cpu",),
    code=("lab/experiments/regression.py", "lab/experiments/regression_report.py"),
)
