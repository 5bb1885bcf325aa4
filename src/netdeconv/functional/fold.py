"""Folding mean, scale and inverse square root into the layer's own weight and bias."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import Function

from netdeconv.functional.precision import as_dtype, at_least_float32, without_autocast
from netdeconv.functional.tracing import transformed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from netdeconv.functional.blocks import Blocks

__all__ = ["fold", "times_roots"]


def fold(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    roots: Sequence[Tensor],
    blocks: Blocks,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the plain layer that whitens its input and then applies ``weight`` and ``bias``.

    ``(x - mean) S D w + b = x (S D w) + (b - mean S D w)``, S the diagonal matrix of ``scale``, D the roots.

    Shapes: weight ``(out, channels / groups, *kernel)``, bias ``(out,)`` or ``None``, mean
    ``blocks.mean_shape``, roots ``blocks.root_shapes``, scale ``(channels,)`` or ``None`` for ones -> the same shapes
    as weight and ``(out,)``, in the weight's dtype. Computed in float32 at least, also under autocast.

    Source: Ye et al. 2020, section 3.4 (implicit deconvolution).
    """
    dtype = at_least_float32(weight.dtype)
    with without_autocast(weight.device.type):
        exact_weight, exact_bias = as_dtype(weight, dtype), None if bias is None else as_dtype(bias, dtype)
        spread, exact_roots = blocks.spread_mean(as_dtype(mean, dtype)), [as_dtype(root, dtype) for root in roots]
        exact_scale = None if scale is None else as_dtype(scale, dtype)
        recorded = [exact_weight, *exact_roots, *(() if exact_scale is None else (exact_scale,))]
        fold_in = _Fold.apply if _recorded(*recorded) and not transformed() else _plain_fold
        folded, shifted = fold_in(blocks, exact_weight, exact_bias, spread, exact_scale, *exact_roots)
    return as_dtype(folded, weight.dtype), as_dtype(shifted, weight.dtype)


def _plain_fold(
    blocks: Blocks, weight: Tensor, bias: Tensor | None, mean: Tensor, scale: Tensor | None, *roots: Tensor
) -> tuple[Tensor, Tensor]:
    """``(w, b) -> (S D w, b - mean S D w)`` for every group, in operators that anything can look through."""
    same = torch.is_grad_enabled() or torch.jit.is_tracing()  # a trace is checked against one without gradient
    folded = times_roots(weight.reshape(blocks.groups, -1, blocks.group_features), roots, blocks)
    if scale is not None:
        folded = blocks.times_channels(folded, scale, in_place=not same)
    if blocks.groups == 1:
        rows, about = folded[0], mean[0]
        shifted = torch.mv(rows, -about) if bias is None else torch.addmv(bias, rows, about, alpha=-1)
    elif bias is None:
        shifted = torch.bmm(folded, -mean.unsqueeze(-1)).flatten()  # `@` has more operators around it
    else:
        each = bias.reshape(blocks.groups, -1, 1)
        shifted = torch.baddbmm(each, folded, mean.unsqueeze(-1), alpha=-1).flatten()
    return folded.reshape(weight.shape), shifted


def _recorded(*tensors: Tensor) -> bool:
    """Whether :class:`_Fold` is wanted: there is a gradient through the first result.

    One of bias or mean alone goes through the second, and must not make the layer compute that of its weight. Where no
    gradient is recorded at all, torch 2.14's compiler mistakes the Function's arguments.
    """
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class _Fold(Function):
    """:func:`_plain_fold`, with as few passes over the weights backwards as forwards.

    The gradient of S D w is that of the first result less an outer product of the second's and the mean. Without
    scale, the outer product is multiplied by D as a vector, and added in place.
    """

    @staticmethod  # not in two parts, with setup_context: torch takes longer to call that than the product takes
    def forward(
        ctx: Any,
        blocks: Blocks,
        weight: Tensor,
        bias: Tensor | None,
        mean: Tensor,
        scale: Tensor | None,
        *roots: Tensor,
    ) -> tuple[Tensor, Tensor]:
        folded, shifted = _plain_fold(blocks, weight, bias, mean, scale, *roots)
        # What only the gradients of mean, scale and root need is kept only where there are such gradients.
        _, _, _, for_mean, for_scale, *for_roots = ctx.needs_input_grad
        ctx.blocks = blocks
        kept_fold = (folded,) if for_mean or for_scale else ()
        ctx.save_for_backward(mean, scale, *roots, *kept_fold, *((weight,) if any(for_roots) else ()))
        return folded, shifted

    @staticmethod
    def backward(ctx: Any, grad_folded: Tensor, grad_shifted: Tensor) -> tuple[Tensor | None, ...]:
        # Somebody may call backward inside of autocast, and a compiler traces it as if somebody did: so without a look
        # at whether autocast is on now.
        with torch.autocast(grad_folded.device.type, enabled=False):
            return _Fold._gradients(ctx, grad_folded, grad_shifted)

    @staticmethod
    def _gradients(ctx: Any, grad_folded: Tensor, grad_shifted: Tensor) -> tuple[Tensor | None, ...]:
        blocks: Blocks = ctx.blocks
        _, for_weight, for_bias, for_mean, for_scale, *for_roots = ctx.needs_input_grad
        mean, scale, *kept = ctx.saved_tensors
        # By index: torch 2.11's compiler takes what a star has collected for a tuple, which nothing can be popped from.
        roots, kept = kept[: len(for_roots)], kept[len(for_roots) :]
        grad_rows = grad_folded.reshape(blocks.groups, -1, blocks.group_features)
        grad_shift = -grad_shifted.reshape(blocks.groups, -1, 1)
        grad_mean = grad_scale = grad_weight = None
        if for_mean or for_scale:
            folded = kept[0].reshape(grad_rows.shape)
        if for_mean:
            grad_mean = (grad_shift.mT @ folded).squeeze(1)
        total = grad_rows  # the gradient of D w, but for the outer product where that is added as a vector below
        if scale is not None:
            total = torch.addcmul(grad_rows, grad_shift, mean.unsqueeze(1))
            if for_scale:
                grad_scale = blocks.sum_of_channels(total * folded) / scale
            total = blocks.times_channels(total, scale)
        grad_roots: list[Tensor | None] = [None] * len(roots)
        if any(for_roots):
            whole = total if scale is not None else torch.addcmul(grad_rows, grad_shift, mean.unsqueeze(1))
            weights = blocks.split(kept[-1].reshape(grad_rows.shape))
            grad_roots = [
                _rows(part, root).mT @ _rows(back, root) if wanted else None
                for part, back, root, wanted in zip(weights, blocks.split(whole), roots, for_roots, strict=True)
            ]
        if for_weight:
            grad_weight = times_roots(total, roots, blocks)
            if scale is None:
                grad_weight.addcmul_(grad_shift, times_roots(mean.unsqueeze(1), roots, blocks))
            grad_weight = grad_weight.reshape(grad_folded.shape)
        return None, grad_weight, grad_shifted if for_bias else None, grad_mean, grad_scale, *grad_roots


def times_roots(grouped: Tensor, roots: Sequence[Tensor], blocks: Blocks) -> Tensor:
    """(groups, out, features of the group) times the symmetric root of each part."""
    if len(roots) == 1 and not blocks.interleaved:  # nearly always: there is nothing to cut and to join
        return _times_root(grouped, roots[0])
    parts = zip(blocks.split(grouped), roots, strict=True)
    return blocks.join([_times_root(part, root) for part, root in parts])


def _times_root(part: Tensor, root: Tensor) -> Tensor:
    rows = _rows(part, root)
    return (torch.mm(rows, root) if root.dim() == 2 else rows @ root).reshape(part.shape)


def _rows(part: Tensor, root: Tensor) -> Tensor:
    """(groups, out, ...) -> (rows, features of a block), for every group if the root is: what the root multiplies."""
    return part.reshape(*root.shape[:-2], -1, root.shape[-1])
