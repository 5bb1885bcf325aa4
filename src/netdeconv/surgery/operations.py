"""What torch's operations do with the tensors that they are given, as far as whoever watches a model has to know."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "asks_for_type",
    "is_batch_norm",
    "is_pooled",
    "looks_only",
    "memory_of",
    "multiplies_by_weight",
    "says_in_place",
    "version_of",
]

# Properties and methods that tell about a tensor without reading its numbers.
_HARMLESS = {
    getattr(Tensor, name)
    for name in (
        "shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "is_cpu", "is_meta", "layout", "is_sparse",
        "is_quantized", "itemsize", "nbytes",
    )
}
_HARMLESS_METHODS = {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.stride, Tensor.get_device,
    Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous, Tensor.__len__,
    Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.new_tensor,
    torch.zeros_like, torch.ones_like, torch.empty_like,
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
_ADAPTIVE = tuple(f"adaptive_{kind}_pool{n}d" for kind in ("avg", "max") for n in (1, 2, 3))
_REDUCTIONS = ("mean", "sum", "amax", "max", "std", "var")
_BATCH_NORM: tuple[Any, ...] = (F.batch_norm, torch.batch_norm)


def is_batch_norm(func: Any) -> bool:
    """Whether this is torch's function, not a module."""
    return func in _BATCH_NORM


def multiplies_by_weight(name: str, several: bool) -> bool:
    """Whether an operation makes something new by a weight; ``several`` if some of its tensors depend on no input."""
    return name in _BY_WEIGHT or (several and name in _PRODUCTS)


def is_pooled(name: str, x: Tensor, y: Tensor) -> bool:
    """Whether an operation has taken all positions of a map ``(N, C, *spatial)`` together."""
    if x.dim() < 3 or not x.dim() >= y.dim() >= 2 or y.shape[:2] != x.shape[:2]:
        return False
    if name in _ADAPTIVE:
        return math.prod(y.shape[2:]) == 1
    return name in _REDUCTIONS and math.prod(y.shape[2:]) == 1


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor's memory was written to; ``None`` in inference mode, where nobody counts."""
    return None if tensor.is_inference() else tensor._version


def says_in_place(name: str, kwargs: Any) -> bool:
    return bool(kwargs.get("inplace")) or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


def memory_of(tensor: Tensor) -> Any:
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # a tensor without storage has no views
        return None


def looks_only(func: Any, args: Any) -> bool:
    """Whether an operation asks a tensor for its shape, type or place, and not for its numbers."""
    if func is Tensor.type and len(args) == 1:  # its name; with a type it converts
        return True
    owner = getattr(func, "__self__", None)
    return func in _HARMLESS_METHODS or (getattr(func, "__name__", "") == "__get__" and owner in _HARMLESS)


def asks_for_type(func: Any, args: Any, parameter: Tensor) -> bool:
    """``x.to(weight)`` and the like: the numbers are not read."""
    return func in (Tensor.to, Tensor.type_as) and bool(args) and args[0] is not parameter
