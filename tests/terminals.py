"""Runs the command line as people do: in a terminal of its own, and into a pipe."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import NamedTuple

import netdeconv

_ROWS, _COLUMNS = 40, 110


class Shown(NamedTuple):
    """What a command in a terminal left: its exit code, all that was drawn, and the lines that stayed."""

    code: int
    drawn: str
    lines: list[str]


def environment() -> dict[str, str]:
    """Of a process that runs this package."""
    source = str(Path(netdeconv.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}


def in_terminal(*argv: str) -> Shown:
    """Run ``netdeconv`` with its three streams on a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, _COLUMNS, 0, 0))
    command = [sys.executable, "-m", "netdeconv", *argv]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment())
    os.close(theirs)
    drawn = bytearray()
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes any more
        while piece := os.read(ours, 1 << 16):
            drawn += piece
    os.close(ours)
    text = drawn.decode()
    return Shown(process.wait(), text, _left(text))


def piped(*argv: str, lines: int) -> subprocess.CompletedProcess[str]:
    """Run ``netdeconv ... | head -n LINES``; the exit code and standard error are those of ``netdeconv``."""
    command = [sys.executable, "-m", "netdeconv", *argv]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), text=True, bufsize=1
    )
    assert process.stdout is not None and process.stderr is not None
    read = [process.stdout.readline() for _ in range(lines)]
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    return subprocess.CompletedProcess(command, process.wait(), "".join(read), error)


def _left(text: str) -> list[str]:
    """The lines on a screen after a text with carriage returns and steps upwards."""
    screen = [""]
    row = column = 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            screen += [""] * (row == len(screen))
        elif part == "\x1b[A":
            row = max(0, row - 1)
        elif not part.startswith("\x1b"):
            screen[row] = screen[row][:column].ljust(column) + part + screen[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in screen if line.strip()]
