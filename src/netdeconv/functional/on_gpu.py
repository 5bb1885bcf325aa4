"""Whether a step on this tensor has kernels of its own, which need a GPU and Triton."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from netdeconv.functional.tracing import traced

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["available_kernels", "is_channels_last", "kernels_for"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def kernels_for(x: Tensor) -> Any:
    """The module :mod:`netdeconv.functional.kernels` where it can be used for x ``(N, C, *spatial)``, else ``None``.

    That is on the current GPU, where Triton is installed and works, and for x in up to float32 that is contiguous or
    channels last; on a CPU where the environment variable ``TRITON_INTERPRET`` is 1. ``NETDECONV_KERNELS=0`` disables
    them. A compiler writes kernels of its own.
    """
    device = x.device
    if device.type == "cuda":
        here = device.index == torch.cuda.current_device()  # where Triton launches, whatever it is given
    else:
        here = _interpreted() and device.type == "cpu"
    if not here or x.dtype not in _DTYPES or type(x) not in _PLAIN or not x.numel():
        return None
    if traced() or is_in_torch_dispatch_mode() or not (x.is_contiguous() or is_channels_last(x)):
        return None
    return available_kernels(device)


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels lie side by side in memory, those of one position after those of another."""
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)


@functools.cache
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def available_kernels(device: torch.device) -> Any:
    """The module, ``None`` where it cannot be used; Triton may be there and fail, for want of a C compiler."""
    if os.environ.get("NETDECONV_KERNELS") == "0":
        return None
    try:
        kernels = importlib.import_module("netdeconv.functional.kernels")
    except ImportError:
        return None
    try:
        kernels.try_out(device)
    except Exception as error:
        warnings.warn(
            f"netdeconv: expected Triton to run on {device}, got {type(error).__name__}: {error}. Whitened layers "
            "train by torch's operators, which take longer. Set NETDECONV_KERNELS=0 to be told no more.",
            stacklevel=2,
        )
        return None
    return kernels
