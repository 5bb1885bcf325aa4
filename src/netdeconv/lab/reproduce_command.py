"""The commands ``netdeconv reproduce``, ``netdeconv demo`` and ``netdeconv report``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from netdeconv import ConfigError
from netdeconv.lab.devices import DEVICES
from netdeconv.lab.experiments.experiment import SIZES, Experiment
from netdeconv.lab.experiments.registry import EXPERIMENTS, load
from netdeconv.lab.options import add_field_options, given_options
from netdeconv.lab.store import write_whole

__all__ = ["demo", "demo_arguments", "report", "report_arguments", "reproduce"]

_OUT = Path("runs/reproduce")
_INTERRUPTED = 130
_THREADS = "threads to compute with (default: 1 for smoke, otherwise torch's choice)"


def reproduce(arguments: Sequence[str], parser_class: type[argparse.ArgumentParser]) -> int:
    """Run one experiment, or all of them, and print their tables.

    Only the experiment that is named is imported; its name tells which options there are.

    Args:
        arguments: those after ``reproduce``.
        parser_class: how to complain.

    Returns:
        Exit code: 0 done, 130 stopped, 143 asked to end.

    Raises:
        ConfigError: data that are not there, or settings that cannot apply. With ``all`` the others are run first.
    """
    given = list(arguments)
    words = [word for before, word in zip(["", *given], given, strict=False) if before != "--out"]
    named = next((word for word in words if word == "all" or word in EXPERIMENTS), None)
    parser = _parser(named if named in EXPERIMENTS else None, parser_class)
    try:
        args = parser.parse_args(given)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    if args.name == "all":
        return _reproduce_all(args)
    experiment = load(args.name)
    settings = experiment.sizes[args.size]
    changes = given_options(args, type(settings))
    return _shown(args, experiment, dataclasses.replace(settings, **changes), changes, args.device)


def _parser(named: str | None, parser_class: type[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    names = "\n".join(f"  {name:<14}{text}" for name, (_, text) in EXPERIMENTS.items())
    parser = parser_class(
        prog="netdeconv reproduce",
        description="Re-run a claim of the paper beside a tuned baseline. Finished parts are not repeated.\n"
        "Started several times at once, with the same --out, the command shares its trainings among the processes.",
        epilog=f"experiments:\n{names}\n\nnetdeconv reproduce NAME --help shows the options of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", choices=[*EXPERIMENTS, "all"], metavar="NAME", help="which experiment, or all")
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="small",
        help="smoke: seconds, without data sets; small: for two cores, minutes to an hour, but half a day for cifar; "
        "paper: as published (default: small)",
    )
    parser.add_argument("--out", type=Path, default=_OUT, metavar="DIR", help=f"run folder (default: {_OUT})")
    parser.add_argument("--threads", type=int, metavar="N", help=_THREADS)
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where networks are trained (default: cpu)")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the tables")
    if named is not None:
        group = parser.add_argument_group(f"options of {named}", "Defaults are those of --size small.")
        add_field_options(group, load(named).sizes["small"])
    return parser


def _reproduce_all(args: argparse.Namespace) -> int:
    problems = []
    for name in EXPERIMENTS:
        experiment = load(name)
        try:
            device = args.device if args.device in experiment.devices else experiment.devices[0]
            code = _shown(args, experiment, experiment.sizes[args.size], {}, device)
        except ConfigError as error:
            problems.append(f"{name}: {error}")
            print(problems[-1], file=sys.stderr)
            continue
        if code:
            return code
    if problems:
        raise ConfigError(f"{len(problems)} of {len(EXPERIMENTS)} experiments could not run. {problems[0]}")
    return 0


def _shown(
    args: argparse.Namespace, experiment: Experiment, settings: Any, changes: dict[str, Any], device: str
) -> int:
    from netdeconv.lab.experiments.results import carry_out, text

    command = _command(experiment.name, args.size, changes) + (f" --device {device}" if device != "cpu" else "")
    try:
        outcome = carry_out(
            experiment,
            settings,
            args.out,
            command=command,
            size=args.size,
            # with networks as tiny as smoke's, threads wait for one another more than they compute
            thread_count=1 if args.threads is None and args.size == "smoke" else args.threads,
            device=device,
            show=not args.quiet,
        )
    except KeyboardInterrupt as stop:
        return _stopped(args.out, stop)
    print(text(outcome) + "\n")
    return 0


def _stopped(out: Path, stop: KeyboardInterrupt) -> int:
    print(f"\nStopped. Finished parts are kept; the same command goes on from {out}.", file=sys.stderr)
    return stop.args[0] if stop.args else _INTERRUPTED  # a training that was asked to end says its exit code


def _command(name: str, size: str, changes: dict[str, Any]) -> str:
    """The command line that gives these settings, without the folder."""
    words = ["netdeconv", "reproduce", name, "--size", size]
    for key, value in changes.items():
        words.append(f"--{key.replace('_', '-')}")
        if not isinstance(value, bool):
            words += [f"{one:.15g}" if isinstance(one, float) else str(one) for one in _several(value)]
    return " ".join(words)


def _several(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


# What the demo shows beside its training, in seconds: changes to the size "small".
_BESIDE: Mapping[str, Mapping[str, Any]] = {
    "filters": {"images": ("photographs",), "sizes": (7,), "stride": 3},
    "correlation": {"dataset": "digits", "network": "small", "width": 1.0, "images": 128},
}


def demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Where, how long and how often."""
    from netdeconv.lab.experiments.demo import QUICK, DemoSettings

    out = Path("runs/demo")
    parser.add_argument("--out", type=Path, default=out, metavar="DIR", help=f"run folder (default: {out})")
    add_field_options(parser, DemoSettings())
    quick = ", ".join(f"{key} {' '.join(f'{one:g}' for one in _several(value))}" for key, value in QUICK.items())
    parser.add_argument("--quick", action="store_true", help=f"other defaults: {quick}")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads to compute with (default: 1)")
    parser.add_argument("--fresh", action="store_true", help="repeat trainings that are finished already")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the table")


def demo(args: argparse.Namespace) -> int:
    """Carry out the experiment demo, show filters and correlation beside it, and write one page; the exit code."""
    from netdeconv.lab.experiments.demo import QUICK, DemoSettings
    from netdeconv.lab.experiments.report_page import write_page
    from netdeconv.lab.experiments.results import carry_out, text

    if (args.out / "metrics.json").is_file():
        print(f"{args.out}: metrics.json and runs are of an earlier version, and not used", file=sys.stderr)
    changes = {**(QUICK if args.quick else {}), **given_options(args, DemoSettings)}
    found = []
    try:
        for name, changed in {"demo": changes, **_BESIDE}.items():
            experiment = load(name)
            found.append(
                carry_out(
                    experiment,
                    dataclasses.replace(experiment.sizes["small"], **changed),
                    args.out,
                    command=_command(name, "small", dict(changed)),
                    thread_count=args.threads,
                    fresh=args.fresh,
                    show=not args.quiet,
                )
            )
    except KeyboardInterrupt as stop:
        return _stopped(args.out, stop)
    page = args.out / "report.html"
    write_page(page, found)
    print(f"\n{text(found[0])}\n\n{page}: all of it, with pictures")
    return 0


def report_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder to report on."""
    parser.add_argument(
        "folder", type=Path, nargs="?", default=_OUT, metavar="DIR", help=f"run folder of reproduce (default: {_OUT})"
    )


def report(args: argparse.Namespace) -> int:
    """Write results.md, report.html and the pictures anew from what is in the run folder."""
    from netdeconv.lab.experiments.report_page import write_page
    from netdeconv.lab.experiments.results import draw, markdown, outcomes

    found = outcomes(args.folder)
    for outcome in found:
        draw(outcome)
    files = [args.folder / "results.md", args.folder / "report.html"]
    write_whole(files[0], markdown(found).encode())
    write_page(files[1], found)
    print("\n".join(map(str, files)))
    return 0
