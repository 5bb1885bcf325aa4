"""Whether a step on this tensor has kernels of its own, which need a GPU and Triton."""

from __future__ import annotations

import functools
import importlib
import os
from typing import TYPE_CHECKING, Any

import torch

from netdeconv.functional.tracing import traced

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["is_channels_last", "kernels", "kernels_for"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels_for(x: Tensor) -> Any:
    """The module :mod:`netdeconv.functional.kernels` where it can be used for x ``(N, C, *spatial)``, else ``None``.

    That is on a GPU, where Triton is installed, and for x in up to float32 that is contiguous or channels last; without
    a GPU where the environment variable ``TRITON_INTERPRET`` is 1. ``NETDECONV_KERNELS=0`` is for nowhere. A compiler
    writes kernels of its own.
    """
    if not (x.is_cuda or _interpreted()) or x.dtype not in _DTYPES or not x.numel() or traced():
        return None
    return kernels() if x.is_contiguous() or is_channels_last(x) else None


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels lie side by side in memory, those of one position after those of another."""
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)


@functools.cache
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def kernels() -> Any:
    """The module, ``None`` where there is none."""
    if os.environ.get("NETDECONV_KERNELS") == "0":
        return None
    try:
        return importlib.import_module("netdeconv.functional.kernels")
    except ImportError:
        return None
