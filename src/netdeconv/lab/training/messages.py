"""What jsonargparse says over several lines, in one."""

from __future__ import annotations

import re

__all__ = ["in_one_line"]


def in_one_line(message: str) -> str:
    """The option, what it takes, and what it got, where the message says so; else the message."""
    found = re.search(r'Parser key "(.+?)"', message)
    if found is None:
        return message
    option = found[1]
    nested = re.search(r"NestedArg\(key='(.+?)'", message)
    if nested is not None:
        option = f"{option}.{nested[1]}"
        if f'Parser key "{nested[1]}"' not in message:
            return f"--{option}: there is no such option"
    value = re.search(r"(?:Given|Got) value: (.*)", message)
    if value is None:
        return message
    kinds = _kinds(message[: value.start()])
    expected = f"expected {' or '.join(kinds)}" if kinds else "does not take this value"
    return f"--{option}: {expected}, got {value[1]}".replace("NoneType", "null")


def _kinds(message: str) -> list[str]:
    """The types and the literal values that are expected, each once."""
    named = re.findall(r"Expected an? (?:<class '(\w+)'>|typing\.Literal\[(.+)\])", message)
    parts = [part for kind, literals in named for part in ([kind] if kind else literals.split(", "))]
    return list(dict.fromkeys(part.strip("'") for part in parts))
