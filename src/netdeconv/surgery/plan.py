"""What a conversion will do, as a table that can be read before it is done."""

from __future__ import annotations

import collections
import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping
from typing import Any

__all__ = ["Action", "ConversionPlan", "Entry", "shown"]


class Action(enum.Enum):
    """What becomes of a module."""

    WHITEN = "whiten"  # the layer becomes its whitened twin
    REMOVE = "remove"  # the batch norm becomes nothing, or the activation it held
    FOLD = "fold"  # the batch norm goes into the layer before it
    AFFINE = "affine"  # the batch norm becomes a fixed scale and shift
    REWRITE = "rewrite"  # the module becomes plain torch modules, which are then looked at in turn
    WAIT = "wait"  # the batch norm stays until the first forward of the converted model shows what becomes of it
    LEAVE = "leave"  # would be converted, but cannot be, or was not wanted
    KEEP = "keep"  # nothing that the conversion is about


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
        build: for carrying it out, makes what takes the module's place; given the module.
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
