"""Time and error of every solver of the inverse root, over sizes and condition numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from netdeconv.functional import SOLVERS, inverse_sqrt
from netdeconv.lab.benchmark.record import start
from netdeconv.lab.benchmark.settings import RootSettings
from netdeconv.lab.benchmark.timing import Candidate, interleaved_times
from netdeconv.lab.devices import device_of
from netdeconv.lab.progress import Progress
from netdeconv.lab.report import Table

__all__ = ["PLAIN", "errors", "newton_schulz_gain", "plain_newton_schulz", "run", "spectrum_matrix", "tables"]

PLAIN = "plain"  # all products of the published recurrence: what the others are compared with
_TIMED_CONDITION = 1e5


def plain_newton_schulz(cov: Tensor, num_iters: int) -> Tensor:
    """The published recurrence, three products a step: T = (3 I - Z Y) / 2, Y <- Y T, Z <- T Z."""
    norm = torch.linalg.matrix_norm(cov)
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    y, z = cov / norm, eye
    for _ in range(num_iters):
        t = 0.5 * (3 * eye - z @ y)
        y = y @ t
        z = t @ z
    return z / norm.sqrt()


def newton_schulz_gain(values: Tensor, num_iters: int) -> Tensor:
    """What the iteration makes of the eigenvalues: the same recurrence on numbers; float64 for a reference."""
    norm = torch.linalg.vector_norm(values)
    y, z = values / norm, torch.ones_like(values)
    for _ in range(num_iters):
        t = 0.5 * (3 - z * y)
        y, z = y * t, t * z
    return z / norm.sqrt()


def spectrum_matrix(size: int, condition: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """``Q diag(values) Q^T`` in float64, with its values, log-uniform from 1 to 1 / condition, and random Q."""
    draw = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=draw))
    q = q * r.diagonal().sign()  # uniform over all bases
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), size, dtype=torch.float64)
    matrix = (q * values) @ q.T
    return (matrix + matrix.T) / 2, values, q


def errors(root: Tensor, cov: Tensor, values: Tensor, basis: Tensor, num_iters: int) -> dict[str, float]:
    """How far a computed root is from the float64 map, and how well it whitens.

    Returns:
        ``gain``: largest relative error of the gain along an eigenvector, against ``num_iters`` steps of
        Newton-Schulz; ``exact_gain``: the same against ``values**-0.5``; ``residual``: largest eigenvalue of
        ``|D cov D - I|``.
    """
    root = root.double().cpu()
    gain = ((basis.T @ root) * basis.T).sum(1)
    eye = torch.eye(len(cov), dtype=cov.dtype)
    whitened = root @ cov @ root - eye
    return {
        "gain": float((gain / newton_schulz_gain(values, num_iters) - 1).abs().max()),
        "exact_gain": float((gain * values.sqrt() - 1).abs().max()),
        "residual": float(torch.linalg.eigvalsh((whitened + whitened.T) / 2).abs().max()),
    }


def solvers(num_iters: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """All solvers that know this number of steps, the plain recurrence first."""
    found: dict[str, Callable[[Tensor], Tensor]] = {PLAIN: partial(plain_newton_schulz, num_iters=num_iters)}
    for solver in SOLVERS:
        solve = partial(inverse_sqrt, num_iters=num_iters, solver=solver)
        try:
            solve(torch.eye(2))
        except ValueError:
            continue
        found[solver] = solve
    return found


def run(settings: RootSettings, progress: Progress, result: dict[str, Any]) -> None:
    """Time the solvers in turn at every size, and take their errors at every condition number."""
    device = device_of(settings.device)
    rows: list[dict[str, Any]] = []
    result["rows"] = rows
    for num_iters, size in itertools.product(settings.iters, settings.sizes):
        known = solvers(num_iters)
        start(progress, f"{num_iters} steps, n = {size}", len(known) * (settings.rounds + len(settings.conditions)))
        found: dict[str, list[dict[str, float]]] = {solver: [] for solver in known}
        for condition in settings.conditions:
            cov, values, basis = spectrum_matrix(size, condition, settings.seed)
            for solver, solve in known.items():
                error = errors(solve(cov.float().to(device)), cov, values, basis, num_iters)
                found[solver].append({"condition": condition, **error})
                progress.step()
        cov = spectrum_matrix(size, _TIMED_CONDITION, settings.seed)[0].float().to(device)
        times = interleaved_times(
            [Candidate(solver, partial(solve, cov)) for solver, solve in known.items()],
            (False,) * settings.rounds,
            device=device,
            seed=settings.seed,
            tick=progress.step,
        )
        rows += [
            {
                "num_iters": num_iters,
                "size": size,
                "solver": solver,
                "time": times.summary(solver),
                "to_plain": times.ratio(solver, PLAIN) if solver != PLAIN else None,
                "errors": found[solver],
                "seconds": list(times.times[solver]),
            }
            for solver in known
        ]


def tables(result: Mapping[str, Any]) -> dict[str, Table]:
    """Times at every size, and gain errors at the largest, for each number of steps."""
    found = {}
    rows = result.get("rows", [])
    for num_iters in sorted({row["num_iters"] for row in rows}):
        mine = [row for row in rows if row["num_iters"] == num_iters]
        sizes = sorted({row["size"] for row in mine})
        names = list(dict.fromkeys(row["solver"] for row in mine))
        at = {(row["solver"], row["size"]): row for row in mine}
        found[f"{num_iters} steps, time in ms (of the plain recurrence's)"] = Table(
            ("solver", *(f"n = {size}" for size in sizes)),
            [(name, *(_time(at[name, size]) for size in sizes if (name, size) in at)) for name in names],
        )
        largest = sizes[-1]
        conditions = [error["condition"] for error in at[names[0], largest]["errors"]]
        for what, title in (
            ("gain", "relative gain error against the float64 map"),
            ("residual", "whitening residual |D C D - I|"),
        ):
            found[f"{num_iters} steps, n = {largest}, {title}"] = Table(
                ("condition number", *(f"{condition:.0e}" for condition in conditions)),
                [(name, *(f"{error[what]:.1e}" for error in at[name, largest]["errors"])) for name in names],
            )
    return found


def _time(row: Mapping[str, Any]) -> str:
    share = f" ({row['to_plain']['value']:.2f})" if row["to_plain"] else " (1)   "
    return f"{1000 * row['time']['step']:.3g}{share}"
