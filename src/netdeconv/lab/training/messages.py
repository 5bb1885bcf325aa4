"""What jsonargparse says over several lines, in one."""

from __future__ import annotations

import re

__all__ = ["in_one_line"]


def in_one_line(message: str) -> str:
    """The option, what it takes, and what it got, where the message says so; else the message."""
    option = re.search(r'Parser key "(.+?)"', message)
    if option is None:
        return message
    unknown = re.search(r"NestedArg\(key='(.+?)'", message)
    if unknown is not None:
        return f"--{option[1]}.{unknown[1]}: there is no such option"
    value = re.search(r"(?:Given|Got) value: (.*)", message)
    kinds = dict.fromkeys(re.findall(r"Expected an? <class '(\w+)'>", message))
    if value is None:
        return message
    expected = f"expected {' or '.join(kinds)}" if kinds else "does not take this value"
    return f"--{option[1]}: {expected}, got {value[1]}".replace("NoneType", "null")
