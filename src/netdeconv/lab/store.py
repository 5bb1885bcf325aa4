"""Numbers on disk: JSON files that are either whole or not there, and what the numbers depend on."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import netdeconv

__all__ = ["code_fingerprint", "finite", "read_json", "versions", "write_json", "write_whole"]


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
    write_whole(path, (json.dumps(finite(value), indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON; ``None`` where there is no such file, or not a whole one."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None


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


def finite(value: Any) -> Any:
    """The value as JSON gives it back: tuples as lists, NaN and infinity as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
