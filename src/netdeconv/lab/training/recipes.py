"""Recipes: settings of published trainings, by name."""

from __future__ import annotations

from pathlib import Path

from netdeconv import ConfigError
from netdeconv.lab.names import nearest

__all__ = ["recipe_path", "recipes"]

_FOLDER = Path(__file__).parents[1] / "recipes"


def recipes() -> dict[str, str]:
    """Name of every recipe, and what it is: the first line of its file."""
    found = {}
    for path in sorted(_FOLDER.glob("*.yaml"), key=_natural):
        with path.open(encoding="utf-8") as file:
            found[path.stem] = file.readline().lstrip("# ").strip()
    return found


def recipe_path(name: str) -> Path:
    """The file of a recipe, by name or path.

    Raises:
        ConfigError: there is none.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = _FOLDER / f"{name}.yaml"
    if known.is_file():
        return known
    if path.suffix or len(path.parts) > 1:
        raise ConfigError(f"--config: there is no file {name}. netdeconv recipes lists the names that need no path")
    raise ConfigError(f"--config: there is no recipe {name}. {nearest(name, recipes())}")


def _natural(path: Path) -> list[tuple[int, str]]:
    """Numbers in a name by their value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.stem.split("-")]
