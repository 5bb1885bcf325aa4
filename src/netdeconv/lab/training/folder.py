"""The folder of a run: what was trained, with what, and whether it can go on."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import netdeconv
from netdeconv import ConfigError
from netdeconv.lab.store import read_json, versions, write_json, write_whole

__all__ = ["CONFIG", "begun", "check_same_settings", "find_checkpoint", "note_start", "write_config"]

CONFIG = "config.yaml"

# What the trained weights depend on. Everything else may change from one start to the next.
_FIXED = (
    "network", "width", "norm", "whitening", "smoothing", "aux_weight", "aux_rate_factor", "data", "optimizer",
    "schedule", "seed_everything",
    *(f"trainer.{name}" for name in (
        "max_epochs", "max_steps", "accumulate_grad_batches", "limit_train_batches", "gradient_clip_val",
        "gradient_clip_algorithm", "precision",
    )),
)  # fmt: skip
_FREE_OF_DATA = ("root", "download", "num_workers", "strict")


def write_config(folder: Path, config: str) -> None:
    """Keep the resolved settings."""
    write_whole(folder / CONFIG, config.encode())


def begun(folder: Path) -> bool:
    """Whether a training has come to its first checkpoint or its first epoch's end in the folder."""
    return (folder / "metrics.csv").is_file() or find_checkpoint(folder, None, order=("last", "best")) is not None


def check_same_settings(folder: Path, config: str) -> None:
    """Refuse to go on in a folder that holds a run with other settings.

    A run that failed before its first checkpoint and its first epoch's end, say for want of its data, binds nobody.

    Raises:
        ConfigError: they differ in something that the weights depend on.
    """
    import yaml

    path = folder / CONFIG
    if not begun(folder) or not path.is_file():
        return
    try:
        before, now = _flat(yaml.safe_load(path.read_text(encoding="utf-8"))), _flat(yaml.safe_load(config))
    except (UnicodeDecodeError, yaml.YAMLError):
        raise ConfigError(f"{path}: is damaged. Choose another --out, or delete {folder}") from None
    for name in {**before, **now}:
        last = name.rpartition(".")[2]
        fixed = any(name == prefix or name.startswith(f"{prefix}.") for prefix in _FIXED)
        if fixed and not (name.startswith("data.") and last in _FREE_OF_DATA) and before.get(name) != now.get(name):
            raise ConfigError(
                f"{folder} holds a run with {name} {_shown(before.get(name))}, this one has {_shown(now.get(name))}. "
                "Give that run's settings to go on with it, or another --out"
            )


def find_checkpoint(folder: Path, wanted: str | None, *, order: tuple[str, ...]) -> Path | None:
    """The checkpoint to begin with.

    Args:
        folder: of the run.
        wanted: ``"last"`` or ``"best"`` of the folder, ``"none"``, or a path; ``None`` for the first in ``order``
            that is there.
        order: names to look for.

    Raises:
        ConfigError: it is not there.
    """
    names = {name: folder / "checkpoints" / f"{name}.ckpt" for name in ("last", "best")}
    if wanted is None:
        return next((names[name] for name in order if names[name].is_file()), None)
    if wanted == "none":
        return None
    path = names.get(wanted, Path(wanted))
    if not path.is_file():
        raise ConfigError(f"--ckpt_path {wanted}: expected a checkpoint, there is no {path}")
    return path


def note_start(folder: Path, *, seed: Any, checkpoint: Path | None, parameters: int, processes: int) -> None:
    """Add a start to ``run.json``: when, with which command, versions, git revision and hardware."""
    path = folder / "run.json"
    found = read_json(path)
    starts = found.get("starts", []) if isinstance(found, dict) else []
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    start = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["netdeconv", *sys.argv[1:]]),
        "from": None if checkpoint is None else str(checkpoint),
        "versions": versions(),
        "git": _git_revision(),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }
    write_json(path, {"seed": seed, "parameters": parameters, "starts": [*starts, start]})


def _git_revision() -> dict[str, Any] | None:
    """Revision of the package's source, and whether there are changes to it; ``None`` outside a repository."""
    source = Path(netdeconv.__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=source, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        tracked = git("ls-files", "--", "__init__.py")  # an installed package may lie inside somebody's repository
        return {"revision": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--", "."))} if (
            tracked
        ) else None  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{name}" if prefix else str(name))
    return flat


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
