"""``netdeconv bench``: which benchmarks there are, their options, and what happens when one is called."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netdeconv.lab.benchmark.settings import (
    MemorySettings,
    MomentsSettings,
    RootSettings,
    ScalingSettings,
    Settings,
    StepSettings,
)
from netdeconv.lab.options import add_field_options, given_options

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from netdeconv.lab.progress import Progress
    from netdeconv.lab.report import Table

__all__ = ["BENCHMARKS", "add_arguments", "measure", "run"]

# Name -> settings, and the line that explains it.
BENCHMARKS: dict[str, tuple[type[Settings], str]] = {
    "step": (StepSettings, "Training step, evaluation and memory of a network, beside BatchNorm's."),
    "memory": (MemorySettings, "Memory of a training step, each candidate in a fresh process."),
    "root": (RootSettings, "Time and error of every solver of the inverse root."),
    "moments": (MomentsSettings, "Time and error of the covariance by how many patches are looked at."),
    "scaling": (ScalingSettings, "Whitening's share of one layer's step by channels, batch and map size."),
}


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """The heavy part of a benchmark."""

    run: Callable[[Any, Progress, dict[str, Any]], None]
    tables: Callable[[Mapping[str, Any]], dict[str, Table]]
    figure: Callable[[Mapping[str, Any], str], Figure]
    headline: Callable[[Any], str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand for every benchmark; its options are the fields of its settings."""
    subcommands = parser.add_subparsers(metavar="BENCHMARK", required=True, parser_class=type(parser))
    for name, (settings, text) in BENCHMARKS.items():
        sub = subcommands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(benchmark=name)
        sub.add_argument(
            "--out",
            type=Path,
            default=Path("runs/bench"),
            metavar="DIR",
            help=f"folder for {name}.json and {name}.png (default: runs/bench)",
        )
        sub.add_argument("--quiet", action="store_true", help="no progress, only the tables")
        add_field_options(sub, settings)


def run(args: argparse.Namespace) -> int:
    """Measure, write the files, print the tables; after Ctrl-C write what was measured so far."""
    settings_class, _ = BENCHMARKS[args.benchmark]
    settings = settings_class(**given_options(args, settings_class))
    from netdeconv.lab.progress import Progress

    with Progress(show=not args.quiet) as progress:
        record, shown, files = measure(args.benchmark, settings, args.out, progress)
    if not record["complete"]:
        kept = f" What was measured so far is in {files[0]}." if files else ""
        print(f"\nnetdeconv bench {args.benchmark}: stopped.{kept}", file=sys.stderr)
        return 130
    print("\n".join([shown, "", *map(str, files)]))
    return 0


def measure(name: str, settings: Settings, out: Path, progress: Progress) -> tuple[dict[str, Any], str, list[Path]]:
    """One benchmark from settings to files.

    Returns:
        What is in the JSON file, the text for the terminal, and the files. Interrupted, the record says
        ``complete: false`` and the text is empty; there are files if anything had been measured.
    """
    from netdeconv.lab.allocator import keep_freed_memory
    from netdeconv.lab.benchmark import record as records
    from netdeconv.lab.devices import device_of, matmul_precision, threads

    benchmark = _load(name)
    device_of(settings.device)
    out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is known before the work
    result: dict[str, Any] = {}
    if not settings.give_back:
        keep_freed_memory()  # memory itself is measured in processes of their own
    with threads(settings.threads), matmul_precision(settings.matmul_precision):
        record = records.describe(name, settings)
        try:
            benchmark.run(settings, progress, result)
        except KeyboardInterrupt:
            record["result"] = result
            return record, "", records.write(out, record, None)[:1] if result else []
    record |= {"result": result, "complete": True}
    headline = benchmark.headline(settings)
    shown = records.text(headline, benchmark.tables(result), record)
    files = records.write(out, record, benchmark.figure(result, headline))
    return record, shown, files


def _load(name: str) -> Benchmark:
    from netdeconv.lab.benchmark import figures, moments, root, scaling, step

    if name == "step":
        return Benchmark(step.run, step.tables, figures.step_figure, step.headline)
    if name == "memory":
        return Benchmark(step.run_memory, step.memory_tables, figures.memory_figure, step.headline)
    if name == "root":
        return Benchmark(root.run, root.tables, figures.root_figure, lambda s: "Inverse root of one matrix, float32")
    if name == "moments":
        return Benchmark(
            moments.run, moments.tables, figures.moments_figure, lambda s: f"Moments of 3x3 patches, batch {s.batch}"
        )
    return Benchmark(scaling.run, scaling.tables, figures.scaling_figure, lambda s: "One 3x3 convolution, float32")
