"""A training step of a convolution whitened by its own scale and a kept root, as one autograd node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function

from netdeconv.functional.blocks import Blocks
from netdeconv.functional.fold import fold, times_roots
from netdeconv.functional.on_gpu import available_kernels, is_channels_last, kernels_for
from netdeconv.functional.precision import as_dtype, autocasts, without_autocast
from netdeconv.functional.scale import (
    LEAST_SHARE,
    along_channels,
    channel_variance,
    least_variance,
    scale_of,
    some_images,
)

__all__ = ["Geometry", "Slope", "scale_and_slope", "whitened_convolution"]


class Geometry(NamedTuple):
    """What a convolution takes behind its bias; the padding is of zeros, equally many before and after."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class Slope(NamedTuple):
    """How a scale was computed: what its gradient needs.

    Args:
        mean: of every channel, in the images that the variances are of.
        own: one over the number of entries that they are of, for a channel divided by its own deviation; otherwise 0;
            one number where it is the same for all channels.
        common: the same, times the share of every variance, for a channel divided by the least one, of the mean;
            ``None`` where there is no such channel.
        max_rows: as :func:`netdeconv.functional.channel_variance` got it.
        eps: the smallest variance that a channel is divided by.
    """

    mean: Tensor
    own: Tensor | float
    common: Tensor | None
    max_rows: int | None
    eps: float

    def where(self, counts: Tensor | bool) -> Slope:
        """The slope, or that of a constant."""
        return self._replace(own=self.own * counts, common=None if self.common is None else self.common * counts)


def scale_and_slope(
    var: Tensor, mean: Tensor, count: int, *, max_rows: int | None, eps: float, all_above: bool = False
) -> tuple[Tensor, Slope]:
    """:func:`netdeconv.functional.scale_of` and its slope for what ``channel_variance`` returned, without gradient.

    Args:
        all_above: the caller knows that every variance is above the least one.
    """
    if all_above:
        return var.rsqrt(), Slope(mean, 1 / max(1, count), None, max_rows, eps)
    least = least_variance(var, eps)
    own = (var > least).to(var.dtype) / max(1, count)
    of_mean = (least > eps).to(var.dtype) * (LEAST_SHARE / max(1, len(var)))
    return var.maximum(least).rsqrt(), Slope(mean, own, (1 / max(1, count) - own) * of_mean, max_rows, eps)


def whitened_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    roots: Sequence[Tensor],
    scale: Tensor,
    slope: Slope,
    blocks: Blocks,
    geometry: Geometry,
) -> Tensor:
    """``conv(x, *fold(weight, bias, mean, roots, blocks, scale))``: mean and roots constants, scale a function of x.

    The scale's gradient is added to the convolution's in place, and only into the images that the scale is of; step by
    step it would be written out in the size of x twice. Differentiable any number of times.

    Shapes: x ``(N, C, *spatial)``; the others as in :func:`netdeconv.functional.fold`. Fold and scale are computed in
    float32 at least, the convolution in x's dtype or autocast's.

    Args:
        scale: of every channel of x, without gradient.
        slope: how it was computed.
    """
    result: Tensor = _Step.apply(x, weight, bias, mean, scale, slope, blocks, geometry, *roots)
    return result


class _Step(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mean: Tensor,
        scale: Tensor,
        slope: Slope,
        blocks: Blocks,
        geometry: Geometry,
        *roots: Tensor,
    ) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if autocasts(kind) else x.dtype
        kernels = None if slope.common is None else kernels_for(x)  # which know numbers of every channel only
        roots = tuple(as_dtype(root, scale.dtype) for root in roots)
        with without_autocast(kind):
            if kernels is None:
                each, product = blocks.of_channels(scale).unsqueeze(1), None
                folded, shifted = fold(weight, bias, mean, roots, blocks, each)
            else:
                rows = as_dtype(weight, scale.dtype).reshape(blocks.groups, -1, blocks.group_features)
                each, product = None, times_roots(rows, roots, blocks)
                last = is_channels_last(x) and not x.is_contiguous()
                folded, shifted = kernels.folded(product, scale, mean, bias, weight, dtype, last)
            y = _convolution(as_dtype(x, dtype), as_dtype(folded, dtype), as_dtype(shifted, dtype), geometry)
        ctx.save_for_backward(x, weight, bias, mean, scale, folded, product, each, *roots)
        ctx.rest = slope, blocks, geometry, dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grad.device.type):  # somebody may call backward inside of autocast
            own = _by_parts(ctx, grad) if torch.is_grad_enabled() else _gradients(ctx, grad)
        return *own, *[None] * (len(ctx.needs_input_grad) - len(own))


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of x, weight and bias."""
    x, weight, _, mean, scale, folded, product, each, *roots = ctx.saved_tensors
    slope, blocks, geometry, dtype = ctx.rest
    for_x, _, for_bias, *_ = ctx.needs_input_grad
    padding_of_output = [0] * len(geometry.stride)
    grad_x, grad_folded, grad_shifted = torch.ops.aten.convolution_backward(
        grad, as_dtype(x, dtype), as_dtype(folded, dtype), [folded.shape[0]],
        *geometry[:3], False, padding_of_output, geometry.groups, [for_x, True, True],
    )  # fmt: skip
    grad_bias = as_dtype(grad_shifted, weight.dtype) if for_bias else None
    if product is not None and not _several(grad):
        kernels = available_kernels(x.device)
        grad_folded = grad_folded if is_channels_last(grad_folded) else grad_folded.contiguous()
        total, of_features = kernels.gradient_of_product(grad_folded, grad_shifted, product, scale, mean)
        if for_x:
            grad_x = as_dtype(grad_x, x.dtype)
            grad_x = grad_x if is_channels_last(grad_x) else grad_x.contiguous()
            found = (scale, slope.mean, slope.own, slope.common)
            kernels.add_gradient_of_scale(grad_x, x, of_features, found, slope.max_rows)
        grad_weight = times_roots(total, roots, blocks).reshape(weight.shape)
        return grad_x, as_dtype(grad_weight, weight.dtype), grad_bias
    exact = scale.dtype
    rows = as_dtype(grad_folded, exact).reshape(blocks.groups, -1, blocks.group_features)
    shifts = as_dtype(grad_shifted, exact).reshape(blocks.groups, -1, 1)
    spread = blocks.spread_mean(mean).unsqueeze(1)
    used = as_dtype(folded, exact).reshape(rows.shape)
    in_x = x.numel() < rows.numel()
    along = _along_scale_in_x(x, grad_x, shifts, spread, used, blocks) if for_x and in_x else None
    total = rows.addcmul_(shifts, spread, value=-1)  # in place, as these passes over the weights are what a step takes
    if for_x:
        if along is None:
            along = blocks.sum_of_channels(total * used)
        grad_x = as_dtype(grad_x, x.dtype)
        _add_gradient_of_scale(x, grad_x, along.mul_(scale).mul_(scale), slope)
    each = scale if each is None else each
    grad_weight = times_roots(blocks.times_channels(total, each, in_place=True), roots, blocks).reshape(weight.shape)
    return grad_x, as_dtype(grad_weight, weight.dtype), grad_bias


def _several(grad: Tensor) -> bool:
    """Whether it stands for several gradients, as with ``is_grads_batched``, which have no memory to look at."""
    return torch._C._functorch.is_legacy_batchedtensor(grad) or torch._C._functorch.is_functorch_wrapped_tensor(grad)


def _along_scale_in_x(
    x: Tensor, grad_x: Tensor, shifts: Tensor, spread: Tensor, used: Tensor, blocks: Blocks
) -> Tensor:
    """Of every channel, the gradient by the logarithm of its factor, where x is smaller than the weights."""
    products = as_dtype(x, used.dtype) * grad_x
    of_x = products.sum((0, *range(2, x.dim())))
    return of_x - blocks.sum_of_channels((shifts.mT @ used).mul_(spread))


def _add_gradient_of_scale(x: Tensor, grad_x: Tensor, along: Tensor, slope: Slope) -> None:
    """Add to the gradient of x, in place, that through the variances, of which ``along / 2`` is minus the gradient."""
    own, common = slope.own, slope.common
    # One number waits for the last operators, but in half precision, where the factor may be too large without it.
    if isinstance(own, float) and x.dtype == along.dtype:
        factor, share = along, own
    else:
        factor, share = along * own, 1.0
    if common is not None:
        factor = factor + torch.dot(along, common)
    some, part = some_images(x, slope.max_rows), some_images(grad_x, slope.max_rows)
    by_image, offset = (as_dtype(along_channels(value, x), x.dtype) for value in (factor, factor * slope.mean))
    part.addcmul_(some, by_image, value=-share).add_(offset, alpha=share)


def _by_parts(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The same with a gradient of its own, from operators that have one.

    Of views: x may depend on the weight, and that way is for others to go.
    """
    x, weight = (value.view_as(value) for value in ctx.saved_tensors[:2])
    bias = None if ctx.saved_tensors[2] is None else ctx.saved_tensors[2].view_as(ctx.saved_tensors[2])
    mean, scale, _, _, _, *roots = ctx.saved_tensors[3:]
    slope, blocks, geometry, dtype = ctx.rest
    _, var, _ = channel_variance(x, max_rows=slope.max_rows)
    depends = torch.as_tensor(slope.own, device=x.device) + (0 if slope.common is None else slope.common)
    scale = torch.where(depends.sum() > 0, scale_of(var, slope.eps), scale)
    folded, shifted = fold(weight, bias, mean, roots, blocks, scale)
    y = _convolution(x.to(dtype), folded.to(dtype), shifted.to(dtype), geometry)
    inputs = [value for value, needed in zip((x, weight, bias), ctx.needs_input_grad, strict=False) if needed]
    found = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad[:3])


def _convolution(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry) -> Tensor:
    return torch.convolution(x, weight, bias, *geometry[:3], False, [0] * len(geometry.stride), geometry.groups)
