"""Times of contestants that take turns in one process, and ratios that slow spells of the machine leave alone."""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

__all__ = ["Contestant", "Race", "race", "steady_plan"]

_RESAMPLES = 400
_INTERVAL = (0.025, 0.975)


@dataclasses.dataclass(frozen=True)
class Contestant:
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
class Race:
    """Seconds of every step: ``times[name][round]``; in rounds with ``plan[round]`` periodic contestants refresh."""

    plan: tuple[bool, ...]
    periods: Mapping[str, int]
    times: Mapping[str, Sequence[float]]

    def summary(self, name: str) -> dict[str, Any]:
        """Median, quartiles and mean in seconds; ``step`` is what one step costs over a whole period.

        ``step`` is the median, for a periodic contestant the mean of the medians of ordinary and refresh steps,
        weighted by how often they come.
        """
        seconds, period = self.times[name], self.periods[name]
        result: dict[str, Any] = {
            "step": self._cost(seconds, period, range(len(self.plan))),
            "median": statistics.median(seconds),
            "quartiles": _quartiles(seconds),
            "mean": statistics.fmean(seconds),
            "period": period,
        }
        if period > 1:
            for kind, wanted in (("ordinary", False), ("refresh", True)):
                of_kind = [s for s, refresh in zip(seconds, self.plan, strict=True) if refresh is wanted]
                result[kind] = {"median": statistics.median(of_kind), "quartiles": _quartiles(of_kind)}
        return result

    def ratio(self, name: str, other: str) -> dict[str, Any]:
        """Cost of ``name`` over cost of ``other``, from ratios within rounds, with a 95 % bootstrap interval.

        All times are divided by those of ``other`` in the same round first. The interval comes from drawing
        rounds anew, those with a refresh and those without apart; seeded, so that it is the same every time.
        """
        rounds = range(len(self.plan))
        refresh = [i for i in rounds if self.plan[i]]
        ordinary = [i for i in rounds if not self.plan[i]]
        draw = random.Random(0)
        value = self._ratio(name, other, rounds)
        drawn = sorted(
            self._ratio(name, other, [*draw.choices(refresh, k=len(refresh)), *draw.choices(ordinary, k=len(ordinary))])
            if refresh and ordinary
            else self._ratio(name, other, draw.choices(rounds, k=len(rounds)))
            for _ in range(_RESAMPLES)
        )
        low, high = (drawn[round(share * (_RESAMPLES - 1))] for share in _INTERVAL)
        return {"value": value, "interval": [low, high]}

    def _ratio(self, name: str, other: str, rounds: Sequence[int]) -> float:
        # A periodic contestant below the line is turned over: its own rounds differ, the other's do not.
        if self.periods[other] > 1 and self.periods[name] == 1:
            return 1 / self._ratio(other, name, rounds)
        if self.periods[other] > 1:
            return self._cost(self.times[name], self.periods[name], rounds) / self._cost(
                self.times[other], self.periods[other], rounds
            )
        relative = [mine / its for mine, its in zip(self.times[name], self.times[other], strict=True)]
        return self._cost(relative, self.periods[name], rounds)

    def _cost(self, values: Sequence[float], period: int, rounds: Sequence[int]) -> float:
        if period == 1:
            return statistics.median(values[i] for i in rounds)
        refresh = statistics.median(values[i] for i in rounds if self.plan[i])
        ordinary = statistics.median(values[i] for i in rounds if not self.plan[i])
        return (refresh + (period - 1) * ordinary) / period


def steady_plan(rounds: int, period: int) -> tuple[bool, ...]:
    """Whole refresh periods, at least ``rounds`` long; the refresh lies in the middle of each."""
    periods = -(-rounds // period)
    return tuple(i % period == period // 2 for i in range(periods * period)) if period > 1 else (False,) * rounds


def race(
    contestants: Sequence[Contestant],
    plan: Sequence[bool],
    *,
    device: torch.device,
    turn: int = 1,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> Race:
    """Time every contestant once per round; everyone is equally often first, second, ...

    Args:
        contestants: what to time, warmed up already.
        plan: for every round, whether periodic contestants refresh in it. They must know by themselves, or by
            ``prepare``.
        device: on a GPU events on its stream are timed, elsewhere the clock on the wall.
        turn: steps that a contestant takes in one go. One on a CPU; more on a GPU, where the queue of work would
            run empty at every change.
        seed: of the order.
        tick: called after every turn.
    """
    if len({c.name for c in contestants}) < len(contestants):
        raise ValueError(f"race: expected names that differ, got {[c.name for c in contestants]}.")
    times: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for start, order in zip(range(0, len(plan), turn), _orders(contestants, seed), strict=False):
        for contestant in order:
            times[contestant.name] += _timed(contestant, plan[start : start + turn], device)
            tick()
    return Race(tuple(plan), {c.name: c.period for c in contestants}, times)


def _orders(contestants: Sequence[Contestant], seed: int) -> Iterator[Sequence[Contestant]]:
    """The rotations of a random order, those of its reverse, then another order: places and neighbours change."""
    draw, many = random.Random(seed), len(contestants)
    while True:
        drawn = draw.sample(list(contestants), many)
        for order in (drawn, drawn[::-1]):
            yield from ([*order[i:], *order[:i]] for i in range(many))


def _timed(contestant: Contestant, flags: Sequence[bool], device: torch.device) -> list[float]:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    marks: list[tuple[Any, Any]] = []
    for flag in flags:
        if contestant.prepare is not None:
            contestant.prepare(flag)
        start = _mark(on_gpu)
        contestant.step()
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


def _quartiles(values: Sequence[float]) -> list[float]:
    if len(values) < 2:
        return [values[0], values[0]]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]
