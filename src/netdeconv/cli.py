"""The command ``netdeconv``: reads the command line, calls the lab, prints.

Heavy libraries are imported inside the commands that use them, so that ``--help`` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from netdeconv import __version__
from netdeconv.errors import ConfigError

__all__ = ["main"]

# Libraries of the extra "lab", by the name they are imported with.
_LAB = {
    "docstring_parser",
    "jsonargparse",
    "lightning",
    "matplotlib",
    "numpy",
    "PIL",
    "scipy",
    "sklearn",
    "tensorboard",
    "torchmetrics",
    "torchvision",
    "tqdm",
    "yaml",
}

_USER_ERROR, _INTERRUPTED, _UNREAD = 2, 130, 141

# What a disk can refuse in the midst of writing, where Python names no file.
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(_USER_ERROR, f"{self.prog}: {message}. See {self.prog} --help\n")


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand: what it is called, its arguments, and what it does; ``run`` returns the exit code.

    Without ``add_arguments`` it reads its arguments itself: it finds them in ``arguments``, as they were given.
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None] | None
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit code: 0 done, 1 a training diverged, 2 a mistake of the user (one line on standard error says which),
        130 interrupted, 141 nobody reads the output any more, 143 asked to end.
    """
    try:
        code = _main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # what is left would fail while Python ends, too late to answer
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _UNREAD
    except KeyboardInterrupt:
        print("\nnetdeconv: stopped.", file=sys.stderr)
        return _INTERRUPTED
    return code


def _main(given: Sequence[str]) -> int:
    for command in COMMANDS:
        if command.add_arguments is None and given[:1] == [command.name]:
            return _run(command, argparse.Namespace(arguments=given[1:]))
    parser = _Parser(prog="netdeconv", description="Network deconvolution for PyTorch.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"netdeconv {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for command in COMMANDS:
        sub = commands.add_parser(
            command.name,
            help=command.help,
            description=command.help,
            allow_abbrev=False,
        )
        if command.add_arguments is not None and command.name in given:  # others would cost their imports
            command.add_arguments(sub)
        sub.set_defaults(command=command)
    try:
        args = parser.parse_args(given)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    return _run(args.command, args)


def _run(command: Command, args: argparse.Namespace) -> int:
    from netdeconv.lab.warned import short_warnings

    prog = f"netdeconv {command.name}"
    try:
        with short_warnings(prog):
            return command.run(args)
    except ConfigError as error:
        return _complain(prog, str(error), f"See {prog} --help")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _LAB:
            raise
        return _complain(prog, f"needs {package}, which is not installed", 'Run: pip install "netdeconv[lab]"')
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename is None:
            if error.errno not in _OF_DISKS:
                raise
            return _complain(prog, f"cannot write: {error.strerror}", "Make room, or choose another place")
        return _complain(prog, f"cannot use {error.filename}: {error.strerror}", "Choose another place")
    except KeyboardInterrupt:
        print(f"\n{prog}: stopped.", file=sys.stderr)
        return _INTERRUPTED


def _complain(prog: str, what: str, remedy: str) -> int:
    print(f"{prog}: {' '.join(what.split()).rstrip('.')}. {remedy}", file=sys.stderr)
    return _USER_ERROR


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    from netdeconv.lab.experiments.demo_settings import DemoSettings
    from netdeconv.lab.options import add_options

    helps = {
        "epochs": ("N", "passes over the training images"),
        "seeds": ("N", "runs at every learning rate"),
        "rates": ("RATE", "learning rates to try"),
        "batch_size": ("N", "images in a training batch"),
        "target": ("SHARE", "test accuracy to count the epochs to"),
        "threads": ("N", "threads to compute with"),
    }
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="run folder (default: runs/demo)"
    )
    add_options(parser, DemoSettings, helps)
    quick = DemoSettings.quick()
    rates = " ".join(f"{rate:g}" for rate in quick.rates)
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"other defaults: {quick.epochs} epochs, {quick.seeds} seeds, rates {rates}",
    )
    parser.add_argument("--fresh", action="store_true", help="repeat runs that are finished already")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the table")


def _demo(args: argparse.Namespace) -> int:
    from netdeconv.lab.experiments.demo_settings import DemoSettings

    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(DemoSettings) if hasattr(args, f.name)}
    if "rates" in given:
        given["rates"] = tuple(given["rates"])
    settings = DemoSettings.quick(**given) if args.quick else DemoSettings(**given)
    try:
        from netdeconv.lab.experiments import demo, demo_report

        metrics = demo.run_demo(args.out, settings, fresh=args.fresh, show=not args.quiet)
    except KeyboardInterrupt:
        print(f"\nStopped. Finished runs are kept; the same command goes on from {args.out}.", file=sys.stderr)
        return _INTERRUPTED
    print("\n" + demo_report.summary(metrics, args.out))
    return 0


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    from netdeconv.lab.benchmark import command

    command.add_arguments(parser)


def _bench(args: argparse.Namespace) -> int:
    from netdeconv.lab.benchmark import command

    return command.run(args)


def _reproduce(args: argparse.Namespace) -> int:
    from netdeconv.lab import reproduce_command

    return reproduce_command.reproduce(args.arguments, _Parser)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    from netdeconv.lab import reproduce_command

    reproduce_command.report_arguments(parser)


def _report(args: argparse.Namespace) -> int:
    from netdeconv.lab import reproduce_command

    return reproduce_command.report(args)


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    from netdeconv.lab import export_command
    from netdeconv.surgery.deploy import OPSET

    export_command.add_arguments(parser, opset=OPSET)


def _export(args: argparse.Namespace) -> int:
    from netdeconv.lab import export_command
    from netdeconv.surgery import export_onnx

    return export_command.run(args, export_onnx)


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    from netdeconv.lab import inspect_command

    inspect_command.add_arguments(parser)


def _inspect(args: argparse.Namespace) -> int:
    from netdeconv.lab import inspect_command

    return inspect_command.run(args)


def _training(name: str) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        from netdeconv.lab import fit_command

        return fit_command.run(name, args.arguments)

    return run


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def _recipes(args: argparse.Namespace) -> int:
    from netdeconv.lab import fit_command

    return fit_command.run_recipes(args)


COMMANDS = (
    Command(
        "fit",
        "Train a network by a recipe: --config NAME, then options that override it. Resumes where it was stopped.",
        None,
        _training("fit"),
    ),
    Command("validate", "Evaluate a trained network on the validation part.", None, _training("validate")),
    Command("test", "Evaluate a trained network on the test part.", None, _training("test")),
    Command("recipes", "List the recipes for fit.", _no_arguments, _recipes),
    Command(
        "demo",
        "Train a small network on digits with batch normalisation and with network deconvolution, and compare.",
        _demo_arguments,
        _demo,
    ),
    Command(
        "bench",
        "Measure time, memory and accuracy of network deconvolution, beside batch normalisation's.",
        _bench_arguments,
        _bench,
    ),
    Command(
        "reproduce",
        "Re-run a claim of the paper beside a tuned baseline: an experiment by name, or all of them.",
        None,
        _reproduce,
    ),
    Command(
        "report",
        "Write tables, pictures and one HTML page of the results of reproduce.",
        _report_arguments,
        _report,
    ),
    Command(
        "inspect",
        "Show the input of every layer of a network: correlation, sparsity and the state of its whitening.",
        _inspect_arguments,
        _inspect,
    ),
    Command(
        "export",
        "Write a trained network as an ONNX file, and compare the file with it in onnxruntime.",
        _export_arguments,
        _export,
    ),
)

if __name__ == "__main__":
    sys.exit(main())
