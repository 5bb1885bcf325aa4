"""What torch's operations do with the tensors that they are given, as far as whoever watches a model has to know."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

__all__ = [
    "is_pooled",
    "looks_only",
    "memory_of",
    "multiplies_by_weight",
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
