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

__all__ = ["Action", "ConversionPlan", "Entry", "Pattern", "Selection"]


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
        return ConversionPlan(
            tuple(
                dataclasses.replace(entry, action=done[entry.path][0], why=done[entry.path][1])
                if entry.path in done
                else entry
                for entry in self.entries
            )
        )

    @property
    def batch_norms_left(self) -> tuple[Entry, ...]:
        """Batch norms that the converted model still has."""
        return tuple(entry for entry in self.where(Action.LEAVE, Action.WAIT) if entry.norm)

    @property
    def summary(self) -> str:
        """One line: modules per action."""
        count = collections.Counter(entry.action for entry in self.entries)
        norms = [entry for entry in self.entries if entry.norm]
        gone = f"{len(norms) - len(self.batch_norms_left)} of {len(norms)} batch norms gone"
        parts = [
            f"{count[Action.WHITEN]} layers whitened",
            gone if norms else "no batch norm to remove",
            f"{count[Action.LEAVE]} left as they are",
            f"{count[Action.KEEP]} not concerned",
        ]
        if count[Action.WAIT]:
            parts.insert(2, f"{count[Action.WAIT]} waiting for the first forward")
        if count[Action.REWRITE]:
            parts.insert(1, f"{count[Action.REWRITE]} to be rewritten first")
        return ", ".join(parts)

    def table(self, everything: bool = False) -> str:
        """The plan as text; with ``everything`` also the modules that are not concerned."""
        shown = [entry for entry in self.entries if everything or entry.action is not Action.KEEP]
        rows = [("path", "module", "action", "why")]
        rows += [
            (" = ".join(name or "(model)" for name in (entry.path, *entry.aliases)), entry.kind, entry.action.value,
             entry.why)
            for entry in shown
        ]  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join((*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3])).rstrip()
                 for row in rows]  # fmt: skip
        return "\n".join([*lines, self.summary])

    def __str__(self) -> str:
        return self.table()


Pattern: TypeAlias = "str | type | Callable[[str, nn.Module], bool]"


class Selection:
    """Which modules ``include`` and ``exclude`` leave to be converted, and for what reason others are not.

    A pattern is a path (``"layer4"``; ``*`` and ``?`` match as in file names) or a module class, both with everything
    inside what they match, or a function of path and module, which is asked about each module by itself. A module
    is chosen when some pattern of ``include`` matches, ``None`` meaning all modules, and none of ``exclude``.
    Modules are to be asked about in the order of ``named_modules()``.
    """

    def __init__(
        self, include: Pattern | Iterable[Pattern] | None = None, exclude: Pattern | Iterable[Pattern] | None = None
    ) -> None:
        self.include = None if include is None else _listed("include", include)
        self.exclude = [] if exclude is None else _listed("exclude", exclude)
        self._matched: dict[int, list[str]] = {}  # pattern -> the paths it has matched

    def why_not(self, path: str, module: nn.Module) -> str | None:
        """The reason this module is not chosen; ``None`` when it is."""
        hits = [pattern for pattern in self.exclude if self._matches(pattern, path, module)]
        if hits:
            return f"excluded by {_name(hits[0])}"
        # All patterns are tried, so that one that never matches is found.
        chosen = [self._matches(pattern, path, module) for pattern in self.include or ()]
        return None if self.include is None or any(chosen) else "not in include"

    def names(self, path: str, module: nn.Module) -> bool:
        """Whether a path or a function of ``include`` chooses this module itself, not what it is inside of."""
        return any(
            fnmatch.fnmatchcase(path, pattern)
            if isinstance(pattern, str)
            else not isinstance(pattern, type) and bool(pattern(path, module))
            for pattern in self.include or ()
        )

    def insists(self, path: str) -> bool:
        """Whether ``include`` has this very path, written out."""
        return path in [pattern for pattern in self.include or () if isinstance(pattern, str)]

    def check_used(self) -> None:
        """Complain about a pattern that matched nothing, most often a misspelt path.

        Raises:
            ConfigError: there is one.
        """
        for word, patterns in (("include", self.include or []), ("exclude", self.exclude)):
            for pattern in patterns:
                if id(pattern) not in self._matched:
                    raise ConfigError(
                        f"{word}: expected patterns that match some module of the model, got {_name(pattern)}, which "
                        "matches none. Paths are those of model.named_modules(), e.g. 'layer1.0.conv2' or 'layer1.*'."
                    )

    def _matches(self, pattern: Any, path: str, module: nn.Module) -> bool:
        if isinstance(pattern, str):
            parts = path.split(".")
            found = any(fnmatch.fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))
        elif isinstance(pattern, type):
            above = self._matched.get(id(pattern), [])
            inside = any(not place or path.startswith(f"{place}.") for place in above)
            found = inside or isinstance(module, pattern)
            path = above[0] if inside else path
        else:
            found = bool(pattern(path, module))
        if found and path not in self._matched.setdefault(id(pattern), []):
            self._matched[id(pattern)].append(path)
        return found


def _listed(word: str, patterns: Any) -> list[Any]:
    listed = [patterns] if isinstance(patterns, (str, type)) or callable(patterns) else list(patterns)
    for pattern in listed:
        if not (isinstance(pattern, (str, type)) or callable(pattern)):
            raise ConfigError(
                f"{word}: expected paths, module classes or functions of (path, module), got {pattern!r} of type "
                f"{type(pattern).__name__}."
            )
    return listed


def _name(pattern: Any) -> str:
    return repr(pattern) if isinstance(pattern, str) else getattr(pattern, "__name__", repr(pattern))
