"""Command line options for settings that are kept in a dataclass; light, for the parser loads it at once."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

__all__ = ["add_options"]


def add_options(parser: argparse.ArgumentParser, settings: type, helps: Mapping[str, tuple[str, str]]) -> None:
    """One option for every named setting; those not given are left out of the parsed arguments.

    Args:
        parser: gets the options.
        settings: dataclass with defaults; a setting whose default is a tuple takes several values.
        helps: placeholder and explanation of every setting, by its name.
    """
    for name, (metavar, text) in helps.items():
        default: Any = getattr(settings, name)
        several = isinstance(default, tuple)
        shown = " ".join(map(_shown, default)) if several else default
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(default[0] if several else default),
            nargs="+" if several else None,
            default=argparse.SUPPRESS,
            metavar=metavar,
            help=f"{text} (default: {shown})",
        )


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
