"""Whether something follows the operators that are run here, to do more than run them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy

__all__ = ["as_leaf", "batched", "is_symbol", "traced", "watched"]


def watched() -> bool:
    """Whether something looks on that knows torch's operators only: torch.func, forward-mode gradients, a tracer.

    torch's compiler knows more, and cannot be asked for the others.
    """
    if torch.compiler.is_compiling():
        return False
    functions = torch._C._functorch.peek_interpreter_stack() is not None
    return functions or forward_ad._current_level >= 0 or torch.jit.is_tracing()


def traced() -> bool:
    """:func:`watched`, or torch's compiler looks on."""
    return torch.compiler.is_compiling() or watched()


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
