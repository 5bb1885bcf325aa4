"""Evaluation mode for a while, and random numbers that leave no trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["evaluating", "fork_rng"]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module has its own training flag again, new children their parent's."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags.items():  # not by train(), which may be overridden to do more
            module.training = flag
        for parent in model.modules():
            for child in parent.children():
                if child not in flags:
                    child.training = parent.training


@contextlib.contextmanager
def fork_rng() -> Iterator[None]:
    """The same random numbers on every use, and the global generators untouched."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        yield
