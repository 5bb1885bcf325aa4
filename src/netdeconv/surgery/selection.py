"""Which modules the user has chosen to be converted, by ``include`` and ``exclude``."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from torch import nn

from netdeconv.errors import ConfigError

__all__ = ["Pattern", "Patterns", "Selection"]

Pattern: TypeAlias = "str | type | Callable[[str, nn.Module], bool]"
Patterns: TypeAlias = "Pattern | Iterable[Pattern] | None"


class Selection:
    """Which modules ``include`` and ``exclude`` leave to be converted, and for what reason others are not.

    A pattern is a path (``"layer4"``; ``*`` and ``?`` match as in file names) or a module class, both with everything
    inside what they match, or a function of path and module, which is asked about each module by itself. A module
    is chosen when some pattern of ``include`` matches, ``None`` meaning all modules, and none of ``exclude``.
    Modules are to be asked about in the order of ``named_modules()``.
    """

    def __init__(self, include: Patterns = None, exclude: Patterns = None) -> None:
        self.include, self.exclude = _listed("include", include), _listed("exclude", exclude)
        self._everything = include is None
        self._matched: dict[int, set[str]] = {}  # pattern -> the paths it has matched

    def why_not(self, path: str, module: nn.Module) -> str | None:
        """The reason this module is not chosen; ``None`` when it is."""
        hits = [pattern for pattern in self.exclude if self._matches(pattern, path, module)]
        if hits:
            return f"excluded by {_name(hits[0])}"
        # All patterns are tried, so that one that never matches is found.
        chosen = [self._matches(pattern, path, module) for pattern in self.include]
        return None if self._everything or any(chosen) else "not in include"

    def names(self, path: str, module: nn.Module) -> bool:
        """Whether a path or a function of ``include`` chooses this module itself, not what it is inside of."""
        return any(
            fnmatch.fnmatchcase(path, pattern)
            if isinstance(pattern, str)
            else not isinstance(pattern, type) and bool(pattern(path, module))
            for pattern in self.include
        )

    def insists(self, path: str) -> bool:
        """Whether ``include`` has this very path, written out."""
        return path in [pattern for pattern in self.include if isinstance(pattern, str)]

    def check_used(self) -> None:
        """Complain about a pattern that matched nothing, most often a misspelt path.

        Raises:
            ConfigError: there is one.
        """
        for word, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if id(pattern) not in self._matched:
                    raise ConfigError(
                        f"{word}: expected patterns that match some module of the model, got {_name(pattern)}, which "
                        "matches none. Paths are those of model.named_modules(), e.g. 'layer1.0.conv2' or 'layer1.*'."
                    )

    def _matches(self, pattern: Any, path: str, module: nn.Module) -> bool:
        parts, matched = path.split("."), self._matched.get(id(pattern), set())
        above = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
        if isinstance(pattern, str):
            found = any(fnmatch.fnmatchcase(each, pattern) for each in above)
        elif isinstance(pattern, type):
            found = isinstance(module, pattern) or not matched.isdisjoint(["", *above])
        else:
            found = bool(pattern(path, module))
        if found:
            self._matched.setdefault(id(pattern), set()).add(path)
        return found


def _listed(word: str, patterns: Any) -> list[Any]:
    one = isinstance(patterns, (str, type)) or callable(patterns)
    listed = [patterns] if one else [] if patterns is None else list(patterns)
    for pattern in listed:
        if not (isinstance(pattern, (str, type)) or callable(pattern)):
            raise ConfigError(
                f"{word}: expected paths, module classes or functions of (path, module), got {pattern!r} of type "
                f"{type(pattern).__name__}."
            )
    return listed


def _name(pattern: Any) -> str:
    return repr(pattern) if isinstance(pattern, str) else getattr(pattern, "__name__", repr(pattern))
