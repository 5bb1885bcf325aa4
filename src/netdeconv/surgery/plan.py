"""Which modules to convert, and what a conversion will do to each, as a table to read beforehand."""

from __future__ import annotations

import collections
import dataclasses
import enum
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from torch import nn

from netdeconv.errors import ConfigError

__all__ = ["Action", "ConversionPlan", "Entry", "Patterns", "Selection", "shown"]


class Action(enum.Enum):
    """What becomes of a module."""

    WHITEN = "whiten"  # the layer becomes its whitened twin
    REMOVE = "remove"  # the batch norm becomes nothing, or the activation it held
    FOLD = "fold"  # the batch norm goes into the layer before it
    AFFINE = "affine"  # the batch norm becomes a fixed scale and shift
    REWRITE = "rewrite"  # the module becomes plain torch modules, which are then looked at in turn
    WAIT = "wait"  # the first forward of the converted model decides about the batch norm
    LEAVE = "leave"  # cannot be converted, or was excluded
    KEEP = "keep"  # neither a layer nor a batch norm


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of the plan.

    Attributes:
        path: as in ``model.named_modules()``; the first one of a module with several.
        kind: class of the module.
        action: what becomes of it.
        why: the reason, in words.
        aliases: further paths of the same module.
        asked: the user asked for this to be left (``include``, ``exclude``, ``rules``).
        norm: the module is a batch norm.
        build: from the module, makes what takes its place.
    """

    path: str
    kind: str
    action: Action
    why: str
    aliases: tuple[str, ...] = ()
    asked: bool = False
    norm: bool = False
    build: Callable[[Any], Any] | None = dataclasses.field(default=None, compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class ConversionPlan:
    """All entries, in the order of ``model.named_modules()``; ``print(plan)`` shows a table."""

    entries: tuple[Entry, ...]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, path: str) -> Entry:
        """The entry of this path.

        Raises:
            KeyError: no module there.
        """
        for entry in self.entries:
            if path == entry.path or path in entry.aliases:
                return entry
        raise KeyError(path)

    def where(self, *actions: Action) -> tuple[Entry, ...]:
        """Entries with one of these actions."""
        return tuple(entry for entry in self.entries if entry.action in actions)

    def changed(self, done: Mapping[str, tuple[Action, str]]) -> ConversionPlan:
        """The same plan with other actions, and reasons, for some paths."""
        now: dict[str, Any] = {path: {"action": action, "why": why} for path, (action, why) in done.items()}
        return ConversionPlan(tuple(dataclasses.replace(entry, **now.get(entry.path, {})) for entry in self.entries))

    @property
    def batch_norms_left(self) -> tuple[Entry, ...]:
        """Batch norms that the converted model still has."""
        return tuple(entry for entry in self.where(Action.LEAVE, Action.WAIT) if entry.norm)

    @property
    def summary(self) -> str:
        """One line: modules per action."""
        count = collections.Counter(entry.action for entry in self.entries)
        norms = sum(entry.norm for entry in self.entries)
        gone = f"{norms - len(self.batch_norms_left)} of {norms} batch norms gone"
        parts = {
            f"{count[Action.WHITEN]} layers whitened": True,
            f"{count[Action.REWRITE]} to be rewritten first": count[Action.REWRITE],
            gone if norms else "no batch norm to remove": True,
            f"{count[Action.WAIT]} waiting for the first forward": count[Action.WAIT],
            f"{count[Action.LEAVE]} left as they are": True,
            f"{count[Action.KEEP]} not concerned": True,
        }
        return ", ".join(part for part, said in parts.items() if said)

    def table(self, everything: bool = False) -> str:
        """The plan as text; with ``everything`` also the modules that are not concerned."""
        rows = [("path", "module", "action", "why")]
        for entry in self.entries:
            if everything or entry.action is not Action.KEEP:
                path = " = ".join(name or "(model)" for name in (entry.path, *entry.aliases))
                rows.append((path, entry.kind, entry.action.value, entry.why))
        widths = [*(max(len(row[i]) for row in rows) for i in range(3)), 0]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, self.summary])

    def __str__(self) -> str:
        return self.table()


def shown(items: list[str], between: str = ", ") -> str:
    """The first five, and how many more there are."""
    return between.join([*items[:5], *([f"and {len(items) - 5} more"] if len(items) > 5 else [])])


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
