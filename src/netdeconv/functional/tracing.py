"""What tracers need: whether one is running, and tensors that are made once instead of at every step."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = [
    "as_leaf",
    "batched",
    "cached_constant",
    "caching_is_unsafe",
    "is_symbol",
    "readable",
    "traced",
    "transformed",
    "without_caching",
]

_KEPT = 256  # of each kind; networks have few shapes
_local = threading.local()


def transformed() -> bool:
    """Whether operators run under something that knows torch's own only: torch.func, forward-mode AD, ``jit.trace``.

    torch's compiler knows more, and cannot be asked for the others.
    """
    if torch.compiler.is_compiling():
        return False
    functions = torch._C._functorch.peek_interpreter_stack() is not None
    return functions or forward_ad._current_level >= 0 or torch.jit.is_tracing()


def traced() -> bool:
    """:func:`transformed`, or torch's compiler is tracing."""
    return torch.compiler.is_compiling() or transformed()


def batched(*tensors: Tensor) -> bool:
    """Whether any of them is one of several under ``torch.func.vmap``, at whatever level."""
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            if torch._C._functorch.is_batchedtensor(tensor):
                return True
            tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


def is_symbol(x: Any) -> bool:
    """Whether ``torch.fx`` traces the forward that x is given to."""
    return isinstance(x, Proxy)


def as_leaf(module: nn.Module, x: Any) -> Any:
    """The call of a module as one node of ``torch.fx``'s graph, as those of torch's own layers."""
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(module), (x,), {})


def readable(tensor: Tensor) -> bool:
    """Whether it has numbers, and Python may ask for them."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return not (tensor.is_meta or wrapped or is_in_torch_dispatch_mode())


def cached_constant(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep what a function of hashable arguments, by position, has returned; nobody may write to it.

    The device is one of the arguments: what is kept for one must not be found for another.

    A compiler makes its own constants; tensors made under a tracer, in fake mode or during graph capture must not be
    cached; and one of inference mode could not be used in training.
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
    """Keep nothing that is made in here: tensors made during graph capture must not be cached."""
    before = getattr(_local, "without_caching", False)
    _local.without_caching = True
    try:
        yield
    finally:
        _local.without_caching = before


def caching_is_unsafe() -> bool:
    """Whether tensors made now must not be kept: under a tracer, a dispatch mode, graph capture, as was asked for."""
    if torch.compiler.is_compiling() or getattr(_local, "without_caching", False):
        return True
    capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return capturing or transformed() or is_in_torch_dispatch_mode()
