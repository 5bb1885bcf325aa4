"""Keeping the folded weights of evaluation until something they were made of changes."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from netdeconv.functional.precision import as_dtype, at_least_float32, without_autocast
from netdeconv.functional.tracing import caching_is_unsafe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

__all__ = ["FoldCache"]

Folded = tuple["Tensor", "Tensor"]
Mark = tuple["Tensor", int, "Tensor"]

_NOTHING = torch.empty(0, device="cpu")
_SMALL = 2**14  # numbers, up to which a copy to compare with is cheaper than a product


class FoldCache:
    """The last folded weight and bias, and what they were made of.

    A tensor is taken for unchanged when it is the same memory, its version counter is the same, and so are its values
    or, of a large one, its product with a fixed random vector. The values, one pass over the weights, are what notices
    changes through ``.data``, which no counter counts; a change too small for the product is a rounding error in the
    output as well.

    On other devices than the CPU only memory and version are looked at, as a comparison would have to wait for the
    device: there a change through ``.data`` is seen after the next :meth:`forget`, which layers call when their mode is
    set. Copies and pickles of a layer start empty.
    """

    def __init__(self) -> None:
        self._kept: tuple[list[Mark], Folded, torch.cuda.Event | None] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return FoldCache, ()

    def forget(self) -> None:
        """Compute anew next time what was not compared."""
        if self._kept is not None and any(seen is _NOTHING for *_, seen in self._kept[0]):
            self._kept = None

    def folded(self, made_of: Sequence[Tensor], compute: Callable[[], Folded]) -> Folded:
        """``compute()``, or what it returned last time if none of ``made_of`` has changed since."""
        if caching_is_unsafe() or not all(_can_be_watched(tensor) for tensor in made_of):
            return compute()
        kept = self._kept
        with without_autocast("cpu"):
            prints = [_fingerprint(tensor) for tensor in made_of]
        if kept is not None and _unchanged(made_of, prints, kept[0]):
            _, folded, made = kept
            if made is not None:
                _await(folded, made)
            return folded
        # Aliases, so that their memory cannot be given to another tensor meanwhile.
        marks = [
            (tensor.detach(), tensor._version, seen.clone() if seen is not _NOTHING and _is_small(tensor) else seen)
            for tensor, seen in zip(made_of, prints, strict=True)
        ]
        folded = compute()
        made = torch.cuda.current_stream(folded[0].device).record_event() if folded[0].is_cuda else None
        self._kept = marks, folded, made  # all at once, for other threads and in case compute() fails
        return folded


def _await(folded: Folded, made: torch.cuda.Event) -> None:
    """Let the present stream use what may have been made on another."""
    stream = torch.cuda.current_stream(folded[0].device)
    stream.wait_event(made)
    for tensor in folded:
        tensor.record_stream(stream)


def _unchanged(made_of: Sequence[Tensor], prints: Sequence[Tensor], marks: Sequence[Mark]) -> bool:
    return len(made_of) == len(marks) and all(
        now.data_ptr() == then.data_ptr()
        and now.shape == then.shape
        and now.dtype == then.dtype
        and now.stride() == then.stride()
        and now._version == version
        and torch.equal(seen_now, seen)
        for now, seen_now, (then, version, seen) in zip(made_of, prints, marks, strict=True)
    )


def _can_be_watched(tensor: Tensor) -> bool:
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and not (tensor.is_inference() or tensor.is_meta)
    # Inside torch.func.vmap and its like a tensor has no memory of its own to look at.
    return plain and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _is_small(tensor: Tensor) -> bool:
    return tensor.numel() <= _SMALL or tensor.dim() < 2


def _fingerprint(tensor: Tensor) -> Tensor:
    """A small tensor itself; of a large one a number per row, in float32 at least.

    NaN is never equal to itself: weights with NaN are always folded. On other devices nothing.
    """
    if tensor.device.type != "cpu":
        return _NOTHING
    constant = tensor.detach() if tensor.requires_grad else tensor
    if _is_small(tensor):
        return constant
    dtype = at_least_float32(tensor.dtype)
    return torch.mv(as_dtype(constant.flatten(1), dtype), _vector(constant[0].numel(), dtype))


@functools.lru_cache(maxsize=64)
def _vector(length: int, dtype: torch.dtype) -> Tensor:
    """A low-discrepancy sequence: fixed, without a pattern that weights might share, and nowhere near zero."""
    index = torch.arange(1, length + 1, dtype=torch.float64, device="cpu")
    return index.mul_(0.6180339887498949).frac_().add_(0.5).to(dtype)
