"""What a run folder of ``netdeconv fit``, or a checkpoint, says of the network in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from netdeconv import ConfigError
from netdeconv.lab.checkpoint import read_checkpoint
from netdeconv.lab.training.folder import CONFIG, find_checkpoint

__all__ = ["Saved", "content_of", "find_saved", "located", "place", "settings_in"]


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint, and what is known of it.

    Attributes:
        checkpoint: the file.
        settings: of the training, as in its ``config.yaml``; empty for a plain state dict.
        about: ``network``, ``width``, ``norm`` and ``classes``; empty likewise.
        place: in words, how far the training was.
        folder: of the run, where the file lies in one.
    """

    checkpoint: Path
    settings: Mapping[str, Any]
    about: Mapping[str, Any]
    place: str
    folder: Path | None

    def __str__(self) -> str:
        return f"{self.checkpoint}{self.place}"


def find_saved(what: str | Path) -> Saved | None:
    """A run folder's best checkpoint, or its last one, or the checkpoint that is named; ``None`` for no path at all.

    Args:
        what: a run folder, a checkpoint, or something else, such as the name of a network.

    Raises:
        ConfigError: a path to nothing, a folder without checkpoints, or a file that cannot be read.
    """
    found = located(what)
    return None if found is None else _read(*found)


def located(what: str | Path) -> tuple[Path, Path | None] | None:
    """The checkpoint, not read yet, and the run folder that it lies in, see :func:`find_saved`.

    Raises:
        ConfigError: a path to nothing, or a folder without checkpoints.
    """
    path = Path(what)
    if path.is_dir():
        checkpoint = find_checkpoint(path, None, order=("best", "last"))
        if checkpoint is None:
            missing = path / "checkpoints" / "last.ckpt"
            raise ConfigError(f"{path}: expected a run folder of netdeconv fit, found no {missing}")
        return checkpoint, path
    if path.is_file():
        folder = path.parent.parent if len(path.parts) > 2 else path.absolute().parent.parent
        return path, folder if (folder / CONFIG).is_file() else None
    if path.suffix in (".pt", ".pth", ".ckpt", ".bin") or (len(path.parts) > 1 and ":" not in str(path)):
        raise ConfigError(f"{path}: expected a checkpoint, there is no such file")
    return None


def content_of(checkpoint: Path) -> Any:
    """What is in a checkpoint; where it is damaged, the error names the one beside it that is not.

    Raises:
        ConfigError: see :func:`~netdeconv.lab.checkpoint.read_checkpoint`.
    """
    try:
        return read_checkpoint(checkpoint)
    except ConfigError as error:
        for name in ("best", "last"):
            other = checkpoint.with_name(f"{name}.ckpt")
            if other == checkpoint or not other.is_file():
                continue
            try:
                where = place(read_checkpoint(other))
            except ConfigError:
                continue
            raise ConfigError(
                f"{str(error).rstrip('.')}. {other}{where}, is whole: take that one, with fit by --ckpt_path {name}"
            ) from None
        raise


def settings_in(path: Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        ConfigError: it cannot be read.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    return content if isinstance(content, dict) else {}


def _read(checkpoint: Path, folder: Path | None) -> Saved:
    import yaml

    content = content_of(checkpoint)
    signature = _callbacks(content).get("Signature", {})
    settings = yaml.safe_load(signature.get("settings", "{}"))
    if folder is not None and (folder / CONFIG).is_file():
        settings |= settings_in(folder / CONFIG)
    return Saved(checkpoint, settings, signature.get("about", {}), place(content), folder)


def place(content: Any) -> str:
    """The epoch after whose end a checkpoint was saved, or the step within the next one."""
    rows = _callbacks(content).get("History", {}).get("rows", [])
    if not isinstance(content, Mapping) or "global_step" not in content:
        return ""
    if rows and rows[-1]["step"] == content["global_step"]:
        return f", epoch {rows[-1]['epoch']}"
    return f", step {content['global_step']} in epoch {content.get('epoch', 0) + 1}"


def _callbacks(content: Any) -> dict[str, Any]:
    found = content.get("callbacks") if isinstance(content, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}
