"""The command ``netdeconv``: reads the command line, calls the lab, prints.

Heavy libraries are imported inside the commands that use them, so that ``--help`` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from netdeconv import __version__
from netdeconv.errors import ConfigError

__all__ = ["main"]

# Libraries of the extra "lab", by the name they are imported with.
_LAB = {
    "docstring_parser",
    "jinja2",
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
    """An argument parser whose complaints are one line, and name the option that is nearest."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            from netdeconv.lab.names import nearest

            hint = nearest(unknown[0].partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}. {hint}")
        return found, unknown

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


def _lab(place: str) -> Callable[..., Any]:
    """A function of the lab, by its module and name, whose module is imported when it is called."""
    module, _, name = place.rpartition(".")

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"netdeconv.lab.{module}"), name)(*arguments)

    return call


def _reproduce(args: argparse.Namespace) -> int:
    return _lab("reproduce_command.reproduce")(args.arguments, _Parser)


def _training(name: str) -> Callable[[argparse.Namespace], int]:
    return lambda args: _lab("fit_command.run")(name, args.arguments)


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    from netdeconv.lab import export_command
    from netdeconv.surgery.deploy import OPSET

    export_command.add_arguments(parser, opset=OPSET)


def _export(args: argparse.Namespace) -> int:
    from netdeconv.lab import export_command
    from netdeconv.surgery import export_onnx

    return export_command.run(args, export_onnx)


COMMANDS = (
    Command(
        "fit",
        "Train a network by a recipe: --config NAME, then options that override it. Resumes where it was stopped.",
        None,
        _training("fit"),
    ),
    Command("validate", "Evaluate a trained network on the validation part.", None, _training("validate")),
    Command("test", "Evaluate a trained network on the test part.", None, _training("test")),
    Command("recipes", "List the recipes for fit.", lambda parser: None, _lab("fit_command.run_recipes")),
    Command(
        "demo",
        "Train a small network on digits with batch normalisation and with network deconvolution, and compare.",
        _lab("reproduce_command.demo_arguments"),
        _lab("reproduce_command.demo"),
    ),
    Command(
        "bench",
        "Measure time, memory and accuracy of network deconvolution, beside batch normalisation's.",
        _lab("benchmark.command.add_arguments"),
        _lab("benchmark.command.run"),
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
        _lab("reproduce_command.report_arguments"),
        _lab("reproduce_command.report"),
    ),
    Command(
        "inspect",
        "Show the input of every layer of a network: correlation, sparsity and the state of its whitening.",
        _lab("inspect_command.add_arguments"),
        _lab("inspect_command.run"),
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
