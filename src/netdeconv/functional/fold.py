"""Folding mean and root into the layer's own weight and bias: whitening at the price of a plain layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad
from torch.autograd.function import Function

from netdeconv.functional.precision import without_autocast

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from netdeconv.functional.blocks import Blocks

__all__ = ["fold"]


def fold(
    weight: Tensor, bias: Tensor | None, mean: Tensor, roots: Sequence[Tensor], blocks: Blocks
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the plain layer that whitens its input and then applies ``weight`` and ``bias``.

    ``(x - mean) D w + b = x (D w) + (b - mean D w)``: the first form moves every activation, the second none.

    Shapes: weight ``(out, channels / groups, *kernel)``, bias ``(out,)`` or ``None``, mean
    ``blocks.mean_shape``, roots ``blocks.root_shapes`` -> the same shapes as weight and ``(out,)``, in the
    weight's dtype. Computed in float32 at least, also under autocast.

    Source: Ye et al. 2020, section 3.4 (implicit deconvolution).
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with without_autocast(weight.device.type):
        grouped = weight.to(dtype).reshape(blocks.groups, -1, blocks.group_features)
        spread = blocks.spread_mean(mean.to(dtype))
        exact = [root.to(dtype) for root in roots]
        fold_in = _Fold.apply if _recorded(grouped, spread, *exact) and not _watched() else _plain_fold
        folded, shift = fold_in(blocks, grouped, spread, *exact)
        shifted = -shift.flatten() if bias is None else bias.to(dtype) - shift.flatten()
    return folded.reshape(weight.shape).to(weight.dtype), shifted.to(weight.dtype)


def _plain_fold(blocks: Blocks, grouped: Tensor, mean: Tensor, *roots: Tensor) -> tuple[Tensor, Tensor]:
    """``w -> (D w, mean D w)`` for every group, in operators that anything can look through."""
    folded = _times_roots(grouped, roots, blocks)
    return folded, _shift(folded, mean)


def _shift(folded: Tensor, mean: Tensor) -> Tensor:
    return (folded @ mean.unsqueeze(-1)).squeeze(-1)


def _recorded(*tensors: Tensor) -> bool:
    """Whether a gradient is recorded; where none is, torch 2.14's compiler mistakes :class:`_Fold`'s arguments."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _watched() -> bool:
    """Whether something looks on that knows torch's operators only: torch.func, forward-mode gradients, a tracer."""
    if torch.compiler.is_compiling():
        return False
    functions = torch._C._functorch.peek_interpreter_stack() is not None
    return functions or forward_ad._current_level >= 0 or torch.jit.is_tracing()


class _Fold(Function):
    """:func:`_plain_fold`, with as few passes over the weights backwards as forwards.

    The gradient of w is that of its first result plus an outer product, times D. The outer product is multiplied
    by D as a vector, and added in place; recorded step by step, it would be written out and added up in three more
    passes, each into memory of its own.
    """

    @staticmethod  # not in two parts, with setup_context: torch takes longer to call that than the product takes
    def forward(ctx: Any, blocks: Blocks, grouped: Tensor, mean: Tensor, *roots: Tensor) -> tuple[Tensor, Tensor]:
        folded = _times_roots(grouped, roots, blocks)
        # What only the gradients of mean and root need is kept only where there are such gradients.
        _, _, for_mean, *for_roots = ctx.needs_input_grad
        ctx.blocks = blocks
        ctx.save_for_backward(mean, *roots, *((folded,) if for_mean else ()), *((grouped,) if any(for_roots) else ()))
        return folded, _shift(folded, mean)

    @staticmethod
    def backward(ctx: Any, grad_folded: Tensor, grad_shift: Tensor) -> tuple[Tensor | None, ...]:
        # Somebody may call backward inside of autocast, and a compiler traces it as if somebody did: so without a look
        # at whether autocast is on now.
        with torch.autocast(grad_folded.device.type, enabled=False):
            return _Fold._gradients(ctx, grad_folded, grad_shift)

    @staticmethod
    def _gradients(ctx: Any, grad_folded: Tensor, grad_shift: Tensor) -> tuple[Tensor | None, ...]:
        blocks: Blocks = ctx.blocks
        _, for_weight, for_mean, *for_roots = ctx.needs_input_grad
        mean, *kept = ctx.saved_tensors
        roots, kept = kept[: len(for_roots)], kept[len(for_roots) :]
        grad_mean = (grad_shift.unsqueeze(1) @ kept.pop(0)).squeeze(1) if for_mean else None
        grad_roots: list[Tensor | None] = [None] * len(roots)
        if any(for_roots):
            total = torch.addcmul(grad_folded, grad_shift.unsqueeze(-1), mean.unsqueeze(1))
            weights, totals = blocks.split(kept.pop()), blocks.split(total)
            grad_roots = [
                (_rows(part).mT @ _rows(back)).reshape(root.shape) if wanted else None
                for part, back, root, wanted in zip(weights, totals, roots, for_roots, strict=True)
            ]
        grad_weight = None
        if for_weight:
            whitened_mean = _times_roots(mean.unsqueeze(1), roots, blocks)
            grad_weight = _times_roots(grad_folded, roots, blocks)
            grad_weight.addcmul_(grad_shift.unsqueeze(-1), whitened_mean)
        return None, grad_weight, grad_mean, *grad_roots


def _times_roots(grouped: Tensor, roots: Sequence[Tensor], blocks: Blocks) -> Tensor:
    """(groups, out, features of the group) times the symmetric root of each part."""
    if len(roots) == 1 and not blocks.interleaved:
        rows = grouped.reshape(blocks.groups, -1, roots[0].shape[-1])
        return (rows @ roots[0]).reshape(grouped.shape)
    parts = [
        (_rows(part) @ root).reshape(part.shape) for part, root in zip(blocks.split(grouped), roots, strict=True)
    ]
    return blocks.join(parts)


def _rows(part: Tensor) -> Tensor:
    """(groups, out, blocks, features) -> (groups, out * blocks, features), what one root is applied to."""
    return part.flatten(1, 2)
