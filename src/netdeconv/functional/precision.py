"""In which precision is computed: the tensors' own, whatever autocast would like, or float64."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["as_dtype", "at_least_float32", "autocasts", "exact", "without_autocast"]

_WITHOUT_FLOAT64, _WITHOUT_AUTOCAST = {"mps"}, {"meta"}  # types of device


def exact(x: Tensor) -> Tensor:
    """In float64, or complex128: on x's device, or on the CPU where that device has no such numbers (MPS).

    Differentiable; x itself where it is that already.
    """
    here = x.cpu() if x.device.type in _WITHOUT_FLOAT64 else x
    return here.to(torch.complex128 if x.is_complex() else torch.float64)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """In which statistics of tensors of this dtype are computed; ``torch.promote_types`` is an operator."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.promote_types(dtype, torch.float32)


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, which is an operator even where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for devices of this type; on those that it does not know it never is."""
    return device_type not in _WITHOUT_AUTOCAST and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """``torch.autocast(device_type, enabled=False)`` where it is needed; it takes longer than a few operators."""
    if autocasts(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
