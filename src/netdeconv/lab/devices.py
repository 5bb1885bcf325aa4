"""Where the lab computes, and how exactly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from netdeconv import ConfigError

__all__ = ["DEVICES", "device_of", "matmul_precision"]

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
