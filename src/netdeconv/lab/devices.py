"""Where the lab computes, with how many threads, and how exactly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from netdeconv import ConfigError

__all__ = ["DEVICES", "device_of", "matmul_precision", "threads"]

DEVICES = ("cpu", "cuda")


def device_of(name: str) -> torch.device:
    """The device.

    Raises:
        ConfigError: there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU here. Use --device cpu")
    return torch.device(name)


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Compute float32 products so exactly, in the terms of ``torch.set_float32_matmul_precision``."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Compute with so many threads; ``None`` leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
