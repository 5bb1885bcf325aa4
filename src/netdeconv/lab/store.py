"""Numbers on disk: JSON files that are either whole or not there, and runs that are not repeated."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

import netdeconv

__all__ = ["RunStore", "code_fingerprint", "read_json", "versions", "write_json", "write_whole"]


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a stopped program, never leaves a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON that any reader takes: numbers that are not finite become ``null``."""
    write_whole(path, (json.dumps(_finite(value), indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON; ``None`` where there is no such file, or not a whole one."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None


class RunStore:
    """Finished runs in a folder, one JSON file each, found again by their settings.

    Args:
        folder: made when the first run is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, name: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result that was saved under this name with exactly these settings."""
        found = read_json(self.path(name, settings))
        return found["result"] if found and found.get("settings") == _finite(settings) else None

    def save(self, name: str, settings: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Write a finished run."""
        write_json(self.path(name, settings), {"settings": settings, "result": result})

    @contextlib.contextmanager
    def claimed(self, name: str, settings: Mapping[str, Any], *, wait: bool) -> Iterator[bool]:
        """Keep other processes from the run while the block computes it; a process that dies lets go of it.

        Args:
            name, settings: of the run.
            wait: until another process that has it lets go; otherwise the block gets ``False`` at once.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path(name, settings, "lock"))
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()
        if self.load(name, settings) is not None:  # whoever still waits for the file finds the result
            with contextlib.suppress(OSError):
                Path(lock.lock_file).unlink()

    def path(self, name: str, settings: Mapping[str, Any], ending: str = "json") -> Path:
        """A file's name for this name and these settings: that of the result, or of what belongs to it."""
        text = json.dumps(_finite(settings), sort_keys=True)
        return self.folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.{ending}"


def code_fingerprint(parts: Iterable[str]) -> str:
    """Hash of the package's own source, so that a changed layer does not meet results of the old one.

    Args:
        parts: files and folders relative to the package, e.g. ``("functional", "config.py")``.
    """
    root = Path(netdeconv.__file__).parent
    digest = hashlib.sha256()
    for part in sorted(parts):
        path = root / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def versions() -> dict[str, str]:
    """Versions of everything that numbers may depend on."""
    found = {"python": platform.python_version()}
    packages = ("torch", "torchvision", "lightning", "torchmetrics", "scikit-learn", "numpy", "matplotlib")
    for package in ("netdeconv", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = getattr(netdeconv, "__version__", "unknown") if package == "netdeconv" else "unknown"
    return found


def _finite(value: Any) -> Any:
    """The value as JSON gives it back: tuples as lists, NaN and infinity as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
