"""Times of candidates that take turns in one process, and ratios that slow spells of the machine leave alone."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["Candidate", "Timings", "interleaved_times", "steady_plan"]

_RESAMPLES = 400


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Something to be timed.

    Args:
        name: short name.
        step: one step.
        period: one out of so many steps is a refresh, which costs more; 1 when all steps are alike.
        prepare: called before every step, not timed, with whether the step is to be a refresh.
    """

    name: str
    step: Callable[[], object]
    period: int = 1
    prepare: Callable[[bool], None] | None = None


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds of every step: ``times[name][round]``; in rounds with ``plan[round]`` periodic candidates refresh."""

    plan: tuple[bool, ...]
    periods: Mapping[str, int]
    times: Mapping[str, Sequence[float]]

    def summary(self, name: str) -> dict[str, Any]:
        """Median, quartiles and mean in seconds; ``step`` is what one step costs over a whole period.

        ``step`` is the median, for a periodic candidate the mean of the medians of ordinary and refresh steps,
        weighted by how often they come.
        """
        seconds, period = np.asarray(self.times[name]), self.periods[name]
        result: dict[str, Any] = {
            "step": self._cost(seconds, period, np.arange(len(self.plan))),
            **_quartiles(seconds),
            "mean": float(seconds.mean()),
            "period": period,
        }
        if period > 1:
            refresh = np.asarray(self.plan)
            result |= {"ordinary": _quartiles(seconds[~refresh]), "refresh": _quartiles(seconds[refresh])}
        return result

    def ratio(self, name: str, other: str) -> dict[str, Any]:
        """Cost of ``name`` over cost of ``other``, from ratios within rounds, with a 95 % bootstrap interval.

        All times are divided by those of ``other`` in the same round first. The interval comes from drawing
        rounds anew, those with a refresh and those without apart; seeded, so that it is the same every time.
        """
        from scipy.stats import bootstrap

        kinds = [np.flatnonzero(np.equal(self.plan, refresh)) for refresh in (True, False)]
        fixed = [kind for kind in kinds if len(kind) == 1]
        drawn = [kind for kind in kinds if len(kind) > 1]

        def value(*rounds: np.ndarray) -> float:
            return self._ratio(name, other, np.concatenate([*rounds, *fixed]))

        found = value(*drawn)
        if not drawn:
            return {"value": found, "interval": [found, found]}
        interval = bootstrap(
            drawn, value, n_resamples=_RESAMPLES, vectorized=False, method="percentile", rng=np.random.default_rng(0)
        ).confidence_interval
        return {"value": found, "interval": [float(interval.low), float(interval.high)]}

    def _ratio(self, name: str, other: str, rounds: np.ndarray) -> float:
        mine, theirs = (np.asarray(self.times[one]) for one in (name, other))
        # A periodic candidate below the line is turned over: its own rounds differ, the other's do not.
        if self.periods[other] > 1 and self.periods[name] == 1:
            return 1 / self._ratio(other, name, rounds)
        if self.periods[other] > 1:
            return self._cost(mine, self.periods[name], rounds) / self._cost(theirs, self.periods[other], rounds)
        return self._cost(mine / theirs, self.periods[name], rounds)

    def _cost(self, values: np.ndarray, period: int, rounds: np.ndarray) -> float:
        if period == 1:
            return float(np.median(values[rounds]))
        refreshed = np.asarray(self.plan)[rounds]
        refresh, ordinary = (float(np.median(values[rounds][refreshed == flag])) for flag in (True, False))
        return (refresh + (period - 1) * ordinary) / period


def steady_plan(rounds: int, period: int) -> tuple[bool, ...]:
    """Whole refresh periods, at least ``rounds`` long; the refresh lies in the middle of each."""
    periods = -(-rounds // period)
    return tuple(i % period == period // 2 for i in range(periods * period)) if period > 1 else (False,) * rounds


def interleaved_times(
    candidates: Sequence[Candidate],
    plan: Sequence[bool],
    *,
    device: torch.device,
    turn: int = 1,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> Timings:
    """Time every candidate once per round; everyone is equally often first, second, ...

    Args:
        candidates: what to time, warmed up already.
        plan: for every round, whether periodic candidates refresh in it. They must know by themselves, or by
            ``prepare``.
        device: on a GPU events on its stream are timed, elsewhere the clock on the wall.
        turn: steps that a candidate takes in one go. One on a CPU; more on a GPU, where the queue of work would
            run empty at every change.
        seed: of the order.
        tick: called after every turn.
    """
    if len({c.name for c in candidates}) < len(candidates):
        raise ValueError(f"interleaved_times: expected names that differ, got {[c.name for c in candidates]}.")
    times: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for start, order in zip(range(0, len(plan), turn), _orders(candidates, seed), strict=False):
        for candidate in order:
            times[candidate.name] += _timed(candidate, plan[start : start + turn], device)
            tick()
    return Timings(tuple(plan), {c.name: c.period for c in candidates}, times)


def _orders(candidates: Sequence[Candidate], seed: int) -> Iterator[Sequence[Candidate]]:
    """The rotations of a random order, those of its reverse, then another order: places and neighbours change."""
    draw, many = random.Random(seed), len(candidates)
    while True:
        drawn = draw.sample(list(candidates), many)
        for order in (drawn, drawn[::-1]):
            yield from ([*order[i:], *order[:i]] for i in range(many))


def _timed(candidate: Candidate, flags: Sequence[bool], device: torch.device) -> list[float]:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    marks: list[tuple[Any, Any]] = []
    for flag in flags:
        if candidate.prepare is not None:
            candidate.prepare(flag)
        start = _mark(on_gpu)
        candidate.step()
        marks.append((start, _mark(on_gpu)))
    if on_gpu:
        torch.cuda.synchronize(device)
        return [start.elapsed_time(end) / 1000 for start, end in marks]
    return [end - start for start, end in marks]


def _mark(on_gpu: bool) -> Any:
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _quartiles(seconds: np.ndarray) -> dict[str, Any]:
    first, middle, third = np.percentile(seconds, (25, 50, 75)).tolist()
    return {"median": middle, "quartiles": [first, third]}
