"""One training at a time in a run folder, and no folder of a training that never took a step."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from netdeconv import ConfigError
from netdeconv.lab.training.folder import CONFIG, begun

__all__ = ["LOCK", "claimed"]

LOCK = ".lock"

# Processes that read images live on for up to 5 seconds after a training that was killed, and hold its lock.
_PATIENCE = 7.0
_OURS = (CONFIG, "run.json", "logs", "checkpoints", LOCK)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other trainings out of a run folder while the block trains in it; a process that dies lets go of it.

    If the block fails before the first checkpoint and the first epoch's end, the folder is again as it was before.

    Raises:
        ConfigError: another training is in it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    new = not (folder / CONFIG).exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        raise ConfigError(
            f"{folder}: another netdeconv fit is training there. Wait until it is done, or choose another --out"
        ) from None
    except NotImplementedError:  # a file system without locks
        pass
    try:
        yield
    except BaseException:
        if new and not begun(folder):
            _remove(folder, made)
        raise
    finally:
        lock.release()


def _remove(folder: Path, made: list[Path]) -> None:
    """Remove what a training writes, and folders that are empty then and were not there before."""
    for name in _OURS:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        for path in made:
            path.rmdir()
