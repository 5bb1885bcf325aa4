"""What a conversion will do to every module, as a table that can be read before anything is done."""

from __future__ import annotations

import collections
import dataclasses
import enum
from collections.abc import Iterator, Mapping

__all__ = ["Action", "ConversionPlan", "Entry"]


class Action(enum.Enum):
    """What becomes of a module."""

    WHITEN = "whiten"  # the layer becomes its whitened twin
    REMOVE = "remove"  # the batch norm becomes nothing, or the activation it held
    FOLD = "fold"  # the batch norm goes into the layer before it
    AFFINE = "affine"  # the batch norm becomes a fixed scale and shift
    REWRITE = "rewrite"  # the module becomes plain torch modules, which are then looked at in turn
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
    """

    path: str
    kind: str
    action: Action
    why: str
    aliases: tuple[str, ...] = ()
    asked: bool = False
    norm: bool = False


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
        return tuple(entry for entry in self.where(Action.LEAVE) if entry.norm)

    @property
    def summary(self) -> str:
        """One line: how many modules of which fate."""
        count = collections.Counter(entry.action for entry in self.entries)
        norms = [entry for entry in self.entries if entry.norm]
        gone = f"{len(norms) - len(self.batch_norms_left)} of {len(norms)} batch norms gone"
        parts = [
            f"{count[Action.WHITEN]} layers whitened",
            gone if norms else "no batch norm to remove",
            f"{count[Action.LEAVE]} left as they are",
            f"{count[Action.KEEP]} not concerned",
        ]
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
