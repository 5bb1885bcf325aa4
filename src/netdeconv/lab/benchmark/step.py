"""The training step and the evaluation of whole networks: BatchNorm, none, the default, the published procedure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from netdeconv.lab.benchmark.candidates import Training, kinds
from netdeconv.lab.benchmark.memory import measure_in_fresh_process
from netdeconv.lab.benchmark.record import start
from netdeconv.lab.benchmark.settings import MemorySettings, StepSettings
from netdeconv.lab.benchmark.timing import Candidate, Timings, interleaved_times, steady_plan
from netdeconv.lab.devices import device_of
from netdeconv.lab.methods import Method
from netdeconv.lab.progress import Progress
from netdeconv.lab.report import Table

__all__ = ["headline", "memory_tables", "run", "run_memory", "tables"]

_MB = 1e6
_BASE = "bn"


def run(settings: StepSettings, progress: Progress, result: dict[str, Any]) -> None:
    """Time all candidates in turn, then their memory; fills ``result`` as it goes."""
    device = device_of(settings.device)
    start(progress, "building the networks", len(kinds(settings)))
    candidates: dict[str, Training] = {}
    for kind in kinds(settings):
        candidates[kind] = Training(kind, settings)
        progress.step()
    _warm_up(candidates, settings, progress)
    result["training"] = _training(candidates, settings, device, progress)
    result["evaluation"] = _evaluation(candidates, settings, device, progress)
    result["losses_finite"] = {
        kind: training.loss is not None and math.isfinite(float(training.loss))
        for kind, training in candidates.items()
    }
    candidates.clear()
    if not settings.no_memory:
        run_memory(settings, progress, result)


def run_memory(settings: MemorySettings, progress: Progress, result: dict[str, Any]) -> None:
    """Peak memory of every candidate, each in a fresh process."""
    start(progress, "memory", len(kinds(settings)))
    memory = result["memory"] = {}
    for kind in kinds(settings):
        memory[kind] = measure_in_fresh_process(kind, settings)
        progress.step()
    for kind in memory:
        for what in ("peak", "saved"):
            base = memory[_BASE][what]
            memory[kind][f"{what}_ratio"] = memory[kind][what] / base if base else None


def _warm_up(candidates: Mapping[str, Training], settings: StepSettings, progress: Progress) -> None:
    """First steps, and what a compiler does; both kinds of steps for those that have two."""
    start(progress, "warm-up", len(candidates) * (1 + 2 * settings.warmup))
    for training in candidates.values():
        training.step()
        progress.step()
        for refresh in (True, False) * settings.warmup:
            training.make_next_step(refresh=refresh)
            training.step()
            progress.step()


def _training(
    candidates: Mapping[str, Training], settings: StepSettings, device: torch.device, progress: Progress
) -> dict[str, Any]:
    period = max(training.period for training in candidates.values())
    plan = steady_plan(settings.rounds, period)
    on_gpu = device.type == "cuda"
    for training in candidates.values():
        training.start_at(-(period // 2))  # the refresh in the middle of each period, as planned
    turn = period if on_gpu else 1
    start(progress, "training steps", len(candidates) * len(plan) // turn)
    before = {kind: training.refreshes() for kind, training in candidates.items()}
    found = interleaved_times(
        [Candidate(kind, training.step, training.period) for kind, training in candidates.items()],
        plan,
        device=device,
        turn=turn,
        seed=settings.seed,
        tick=progress.step,
    )
    done = {kind: training.refreshes() - before[kind] for kind, training in candidates.items()}
    return {**_times(found), "refreshes": done, "plan": list(plan)}


def _evaluation(
    candidates: Mapping[str, Training], settings: StepSettings, device: torch.device, progress: Progress
) -> dict[str, Any]:
    start(progress, "evaluation", len(candidates) * (settings.eval_rounds + settings.warmup))
    for training in candidates.values():
        training.model.eval()
        for _ in range(settings.warmup):
            training.evaluate()
            progress.step()
    found = interleaved_times(
        [Candidate(kind, training.evaluate) for kind, training in candidates.items()],
        (False,) * settings.eval_rounds,
        device=device,
        seed=settings.seed,
        tick=progress.step,
    )
    return _times(found)


def _times(found: Timings) -> dict[str, Any]:
    pairs = [(kind, _BASE) for kind in found.times if kind != _BASE]
    pairs += [("nd-paper", "nd")] if "nd-paper" in found.times else []
    return {
        "candidates": {kind: found.summary(kind) for kind in found.times},
        "ratios": {f"{a}/{b}": found.ratio(a, b) for a, b in pairs},
        "seconds": {kind: list(seconds) for kind, seconds in found.times.items()},
    }


def tables(result: Mapping[str, Any]) -> dict[str, Table]:
    """Tables by their headings, of what there is."""
    found: dict[str, Table] = {}
    if "training" in result:
        part = result["training"]
        rows = []
        for kind, times in part["candidates"].items():
            split = [_ms(times[key]["median"]) if key in times else "" for key in ("ordinary", "refresh")]
            rows.append((Method.named(kind).label, _ms(times["step"]), *split, *_against(part, kind)))
        broken = [Method.named(kind).label for kind, finite in result.get("losses_finite", {}).items() if not finite]
        warning = f" (loss not finite, do not trust: {', '.join(broken)})" if broken else ""
        if "nd-paper/nd" in part["ratios"]:
            rows.append(("published / ND", "", "", "", *_ratio(part["ratios"]["nd-paper/nd"])))
        found[f"Training step, ms{warning}"] = Table(
            ("", "per step", "ordinary", "refresh", "/ BatchNorm", "95 % interval"), rows
        )
    if "evaluation" in result:
        part = result["evaluation"]
        rows = [
            (Method.named(kind).label, _ms(times["step"]), *_against(part, kind))
            for kind, times in part["candidates"].items()
        ]
        found["Evaluation, ms"] = Table(("", "per batch", "/ BatchNorm", "95 % interval"), rows)
    return {**found, **memory_tables(result)}


def memory_tables(result: Mapping[str, Any]) -> dict[str, Table]:
    """The table of memory, if it was measured to the end."""
    memory = result.get("memory")
    if not memory or any("peak_ratio" not in one for one in memory.values()):
        return {}
    rows = [
        (
            Method.named(kind).label,
            f"{memory[kind]['peak'] / _MB:.1f}",
            f"{memory[kind]['peak_ratio']:.3f}",
            f"{memory[kind]['saved'] / _MB:.1f}",
            f"{memory[kind]['saved_ratio']:.3f}",
            f"{memory[kind]['model'] / _MB:.1f}",
        )
        for kind in memory
    ]
    heading = f"Memory of a training step, MB (peak: {memory[_BASE]['how']})"
    return {heading: Table(("", "peak", "/ BatchNorm", "kept for backward", "/ BatchNorm", "model"), rows)}


def headline(settings: MemorySettings) -> str:
    """What was run, in one line."""
    width = f" at width {settings.width:g}" if settings.width != 1 else ""
    compiled = (
        f", compiled ({settings.compile_mode})" if isinstance(settings, StepSettings) and settings.compile else ""
    )
    layout = ", channels last" if settings.channels_last else ""
    exactly = "" if settings.matmul_precision == "highest" else f", matmul precision {settings.matmul_precision}"
    return (
        f"{settings.network}{width}, batch {settings.batch}, 3x{settings.size}x{settings.size}, "
        f"{settings.dtype}{layout}{exactly}{compiled}"
    )


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}" if seconds < 10 else f"{1000 * seconds:.0f}"


def _against(part: Mapping[str, Any], kind: str) -> Sequence[str]:
    return ("1", "") if kind == _BASE else _ratio(part["ratios"][f"{kind}/{_BASE}"])


def _ratio(ratio: Mapping[str, Any]) -> tuple[str, str]:
    low, high = ratio["interval"]
    return f"{ratio['value']:.3f}", f"{low:.3f} to {high:.3f}"
