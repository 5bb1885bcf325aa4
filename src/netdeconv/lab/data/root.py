"""Where the data sets are."""

from __future__ import annotations

import os
from pathlib import Path

from netdeconv import ConfigError

__all__ = ["data_root"]


def data_root(root: Path | str | None = None, *, make: bool = False) -> Path:
    """The folder with the data sets: ``root``, or else the environment variable ``NETDECONV_DATA``.

    Args:
        root: the folder, if it was given as an option.
        make: make the folder where there is none, to download to.

    Raises:
        ConfigError: neither is set, or it leads nowhere.
    """
    value = root if root is not None else os.environ.get("NETDECONV_DATA")
    if value and make:
        Path(value).mkdir(parents=True, exist_ok=True)
    if value and Path(value).is_dir():
        return Path(value)
    where = "the environment variable NETDECONV_DATA" if root is None else "the option root"
    got = repr(str(value)) + ", which is no folder" if value else repr(value)
    raise ConfigError(
        f"expected the folder with the data sets in {where}, got {got}. "
        "Set NETDECONV_DATA, or root, to the folder that torchvision.datasets downloads to"
    )
