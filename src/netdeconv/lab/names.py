"""What to say when a name is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["nearest"]


def nearest(name: str, known: Iterable[str], *, listing: Iterable[str] | None = None) -> str:
    """A sentence that points to the nearest known name, or lists the names.

    Args:
        name: what was given.
        known: every name there is.
        listing: which of them to list where none is near; all when ``None``.
    """
    known = list(known)
    plain = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), plain, 1)
    if near:
        return f"The nearest name is {plain[near[0]]}"
    return f"There is {', '.join(sorted(known if listing is None else listing))}"
