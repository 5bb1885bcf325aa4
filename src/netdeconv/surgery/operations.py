"""What an operation of torch does with its tensors, and in which call: what whoever watches a model has to know."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "frames",
    "in_forward_of",
    "is_pooled",
    "looks_only",
    "memory_of",
    "multiplies_by_weight",
    "place_of_use",
    "reads_numbers",
    "says_in_place",
    "version_of",
]

# Properties, methods and functions that tell about a tensor, or make another like it, without reading its numbers.
_HARMLESS = {
    "shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "is_cpu", "is_meta", "layout", "is_sparse",
    "is_quantized", "itemsize", "nbytes", "size", "dim", "numel", "nelement", "element_size", "stride", "get_device",
    "is_floating_point", "is_complex", "is_contiguous", "__len__", "new_zeros", "new_ones", "new_empty", "new_full",
    "new_tensor", "zeros_like", "ones_like", "empty_like",
}  # fmt: skip
# Functions that multiply by a weight: what comes out of them was made by the module that they run in.
_BY_WEIGHT = {
    "linear", "bilinear", "embedding", "embedding_bag", "conv1d", "conv2d", "conv3d", "convolution", "conv_tbc",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "deform_conv2d", "gru", "lstm", "rnn_tanh", "rnn_relu",
    "gru_cell", "lstm_cell", "rnn_tanh_cell", "rnn_relu_cell", "multi_head_attention_forward",
}  # fmt: skip
# These too, where one side depends on no input.
_PRODUCTS = {
    "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "addmv", "baddbmm", "addbmm", "einsum",
    "tensordot", "spmm", "sparse_mm",
}  # fmt: skip
_POOLINGS = {f"adaptive_{kind}_pool{n}d" for kind in ("avg", "max") for n in (1, 2, 3)}
_POOLINGS |= {"mean", "sum", "amax", "max", "std", "var"}


def looks_only(func: Any, args: Any) -> bool:
    """Whether an operation asks a tensor for its shape, type or place, and not for its numbers."""
    name = getattr(func, "__name__", "")
    if name == "__get__":  # of a property
        name = getattr(getattr(func, "__self__", None), "__name__", "")
    return name in _HARMLESS or (func is Tensor.type and len(args) == 1)  # with a type it converts


def reads_numbers(func: Any, args: Any, parameter: Tensor) -> bool:
    """Not so ``x.to(weight)`` and the like."""
    return not (func in (Tensor.to, Tensor.type_as) and bool(args) and args[0] is not parameter)


def multiplies_by_weight(name: str, several: bool) -> bool:
    """Whether an operation makes something new by a weight; ``several`` if some of its tensors depend on no input."""
    return name in _BY_WEIGHT or (several and name in _PRODUCTS)


def is_pooled(name: str, x: Tensor, y: Tensor) -> bool:
    """Whether an operation has taken all positions of a map ``(N, C, *spatial)`` together."""
    some = x.dim() >= 3 and x.dim() >= y.dim() >= 2 and y.shape[:2] == x.shape[:2]
    return some and name in _POOLINGS and math.prod(y.shape[2:]) == 1


def says_in_place(name: str, kwargs: Any) -> bool:
    """Whether an operation is one that writes to its first tensor, by its name or an argument."""
    return bool(kwargs.get("inplace")) or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor's memory was written to; ``None`` in inference mode, where nobody counts."""
    return None if tensor.is_inference() else tensor._version


def memory_of(tensor: Tensor) -> Any:
    """What tensors have alike that lie in the same memory; ``None`` for one without storage, which has no views."""
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return None


# Frames in these folders are not where a user would look.
_INSIDE = (os.path.dirname(os.path.dirname(__file__)) + os.sep, os.path.dirname(torch.__file__) + os.sep)


def frames() -> Iterator[Any]:
    """Those of this thread, from the caller's caller outwards."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def in_forward_of(owners: list[nn.Module]) -> bool:
    """Whether a forward of one of these runs that was called directly, past the hooks."""
    for frame in frames():
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            if any(first is owner for owner in owners):
                return True
    return False


def place_of_use() -> str:
    """Where in the user's code, or another library's, the operation stands."""
    *_, outermost = above = list(frames())
    outside = (frame for frame in above if not os.path.abspath(frame.f_code.co_filename).startswith(_INSIDE))
    frame = next(outside, outermost)
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"
