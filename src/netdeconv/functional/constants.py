"""Tensors that depend on shapes alone, made once instead of at every step."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from netdeconv.functional.onlookers import watched

__all__ = ["cached_constant", "caching_is_unsafe", "without_caching"]

_KEPT = 256  # of each kind; networks have few shapes
_local = threading.local()


def cached_constant(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep what a function of hashable arguments, by position, has returned; nobody may write to it.

    The device is one of the arguments: what is kept for one must not be found for another.

    A compiler makes its own constants, what is made while something looks on (fake tensors, a tracer, a CUDA graph
    that is being captured) is not for others, and a tensor of inference mode could not be used in training.
    """

    @functools.lru_cache(maxsize=_KEPT)
    def kept(*args: Any) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            made = make(*args)
        if made.is_cuda:
            torch.cuda.current_stream(made.device).synchronize()  # other streams will read it
        return made

    @functools.wraps(make)
    def look(*args: Any) -> Tensor:
        return make(*args) if caching_is_unsafe() else kept(*args)

    return look


@contextlib.contextmanager
def without_caching() -> Iterator[None]:
    """Keep nothing that is made in here: where a CUDA graph is about to be recorded, memory is not for others."""
    before = getattr(_local, "without_caching", False)
    _local.without_caching = True
    try:
        yield
    finally:
        _local.without_caching = before


def caching_is_unsafe() -> bool:
    """Whether something looks on, so that constants cannot be kept."""
    if torch.compiler.is_compiling() or getattr(_local, "without_caching", False):
        return True
    capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return capturing or watched() or is_in_torch_dispatch_mode()
