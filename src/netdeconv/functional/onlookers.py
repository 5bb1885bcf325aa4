"""Whether something follows the operators that are run here, to do more than run them."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

__all__ = ["traced", "watched"]


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
