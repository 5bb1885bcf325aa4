"""Computing in the tensors' own precision, whatever autocast would like."""

from __future__ import annotations

import contextlib

import torch

__all__ = ["without_autocast"]


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """``torch.autocast(device_type, enabled=False)`` where it is needed; it takes longer than a few operators."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
