"""Keeping the folded weights of evaluation until something they were made of changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

__all__ = ["FoldCache"]

Folded = tuple["Tensor", "Tensor"]


class FoldCache:
    """The last folded weight and bias, and what they were made of.

    A tensor is taken for unchanged when it is the same memory, its version counter is the same, and so is its
    product with a fixed random vector. The product, one pass over the weights, is what notices changes through
    ``.data``, which no counter counts; a change too small for it is a rounding error in the output as well.

    On other devices than the CPU nothing is kept: there a comparison would have to wait for the device, and folding
    is quick. Copies and pickles of a layer start empty.
    """

    def __init__(self) -> None:
        self._made_of: list[tuple[Tensor, int, Tensor]] = []
        self._folded: Folded | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return FoldCache, ()

    def folded(self, made_of: Sequence[Tensor], compute: Callable[[], Folded]) -> Folded:
        """``compute()``, or what it returned last time if none of ``made_of`` has changed since."""
        if not all(_can_be_watched(tensor) for tensor in made_of):
            return compute()
        prints = [_fingerprint(tensor) for tensor in made_of]
        if self._folded is None or not self._unchanged(made_of, prints):
            # Aliases, so that their memory cannot be given to another tensor meanwhile.
            self._made_of = [
                (tensor.detach(), tensor._version, mark) for tensor, mark in zip(made_of, prints, strict=True)
            ]
            self._folded = compute()
        return self._folded

    def _unchanged(self, made_of: Sequence[Tensor], prints: Sequence[Tensor]) -> bool:
        return len(made_of) == len(self._made_of) and all(
            now.data_ptr() == then.data_ptr()
            and now.shape == then.shape
            and now.dtype == then.dtype
            and now.stride() == then.stride()
            and now._version == version
            and torch.equal(mark_now, mark)
            for now, mark_now, (then, version, mark) in zip(made_of, prints, self._made_of, strict=True)
        )


def _can_be_watched(tensor: Tensor) -> bool:
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return plain and tensor.device.type == "cpu" and not tensor.is_inference()


def _fingerprint(tensor: Tensor) -> Tensor:
    """One number per row. NaN is never equal to itself, so weights with NaN are folded every time."""
    rows = tensor.detach().reshape(len(tensor), -1)
    # A low-discrepancy sequence: fixed, cheap, and without a pattern that weights might share.
    return rows @ torch.arange(1, rows.shape[1] + 1, dtype=torch.float64).mul_(0.6180339887498949).frac_().to(rows.dtype)
