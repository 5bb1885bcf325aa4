"""Warnings as the command line shows them."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator

__all__ = ["short_warnings"]


@contextlib.contextmanager
def short_warnings(prog: str) -> Iterator[None]:
    """Warnings as one line, without the source file and the code that Python shows; above a bar in a terminal.

    Args:
        prog: name of the command, which the line begins with.
    """

    def show(message: Warning | str, *_: object, **__: object) -> None:
        clear = "\r\x1b[K" if sys.stderr.isatty() else ""
        print(f"{clear}{prog}: warning: {' '.join(str(message).split())}", file=sys.stderr)

    before = warnings.showwarning  # not formatwarning, which Lightning replaces when it is imported
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before
