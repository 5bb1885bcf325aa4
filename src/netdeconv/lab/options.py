"""Options of benchmarks and experiments from the fields of a dataclass, whose help is light.

By argparse: their lists are several words behind one option, their switches take no value, and their names have dashes,
all of which jsonargparse's options of classes have otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection
from typing import Any

from netdeconv import ConfigError

__all__ = ["add_field_options", "check_fields", "given_options", "option"]


def option(default: Any, text: str, *, kind: type | None = None, choices: tuple[str, ...] | None = None) -> Any:
    """A field of a dataclass that is also an option of the command line.

    Args:
        default: of the field; a tuple takes several values, ``False`` makes a switch.
        text: what the option does.
        kind: type of a value, where the default does not tell it.
        choices: values that are allowed.
    """
    return dataclasses.field(default=default, metadata={"help": text, "kind": kind, "choices": choices})


def add_field_options(parser: argparse._ActionsContainer, settings: Any) -> None:
    """One option for every field made by :func:`option`; those not given are left out of the parsed arguments.

    Args:
        parser: gets the options; a group of a parser will do.
        settings: a dataclass, or an instance of it whose values are then shown as the defaults.
    """
    for field in dataclasses.fields(settings):
        default: Any = field.default if isinstance(settings, type) else getattr(settings, field.name)
        name, text = f"--{field.name.replace('_', '-')}", field.metadata["help"]
        if isinstance(default, bool):
            parser.add_argument(name, action="store_true", default=argparse.SUPPRESS, help=text)
            continue
        several = isinstance(default, tuple)
        shown = " ".join(map(_shown, default)) if several else _shown(default)
        kind = field.metadata["kind"] or type(default[0] if several else default)
        parser.add_argument(
            name,
            type=kind,
            nargs="+" if several else None,
            choices=field.metadata["choices"],
            default=argparse.SUPPRESS,
            metavar=None if field.metadata["choices"] else {int: "N", float: "X", str: "NAME"}[kind],
            help=text if default is None else f"{text} (default: {shown})",
        )


def check_fields(settings: Any, *, may_be_zero: Collection[str] = ("seed",)) -> None:
    """Check the fields of a dataclass that were made by :func:`option`.

    Raises:
        ConfigError: a value outside its choices, a number that is not above 0, an empty or repeating list.
    """
    for field in dataclasses.fields(settings):
        value, choices = getattr(settings, field.name), field.metadata.get("choices")
        several = value if isinstance(value, tuple) else (value,)
        for one in several:
            if choices is not None and one not in choices:
                raise ConfigError(f"expected {field.name} one of {', '.join(choices)}, got {one!r}")
            number = isinstance(one, (int, float)) and not isinstance(one, bool)
            if number and field.name not in may_be_zero and not 0 < one < float("inf"):
                raise ConfigError(f"expected {field.name} above 0, got {one:g}")
        if not several:
            raise ConfigError(f"expected at least one of {field.name}, got none")
        if len(set(several)) < len(several):
            raise ConfigError(f"expected values of {field.name} that differ, got {list(several)}")


def given_options(args: argparse.Namespace, settings: type) -> dict[str, Any]:
    """The settings that were given on the command line, lists as tuples."""
    return {
        field.name: tuple(value) if isinstance(value, list) else value
        for field in dataclasses.fields(settings)
        if (value := getattr(args, field.name, None)) is not None
    }


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
