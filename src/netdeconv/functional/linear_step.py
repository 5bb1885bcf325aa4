"""A training step of a linear layer whitened by the root of the batch itself, as one autograd node."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from netdeconv.functional.polynomials import chebyshev_gradient, chebyshev_stages
from netdeconv.functional.precision import without_autocast
from netdeconv.functional.scale import varies
from netdeconv.functional.tracing import cached_constant

__all__ = ["pooled", "range_of_variance", "usable", "whitened_linear"]


def whitened_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    num_iters: int,
    block: int | None = None,
    otherwise: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """``(x - mean) D W^T + b``, with D the root of these rows' covariance and the gradient through both.

    What :func:`netdeconv.functional.patch_moments`, :func:`netdeconv.functional.inverse_sqrt` with ``"chebyshev"`` and
    :func:`netdeconv.functional.fold` say, in a third of the operators. Differentiable any number of times.

    Shapes: x ``(rows, in)``, weight ``(out, in)``, bias ``(out,)`` or ``None``, all of one dtype, float32 or float64 ->
    ``(rows, out)``, and without gradient mean ``(in,)``, covariance and D ``(block, block)``, and whether these are
    used.

    Args:
        block: features that are whitened together, with one D for all such blocks; ``None`` for all features.
        otherwise: mean and D that take the place of the rows' own where these are not :func:`usable`, without a
            gradient through them, for who cannot look; ``None`` where the caller does, and nothing is said.
    """
    mean, root = (None, None) if otherwise is None else otherwise
    settings = (eps, num_iters, x.shape[1] if block is None else block)
    found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None] = _Step.apply(x, weight, bias, *settings, mean, root)
    return found


def usable(mean: Tensor, cov: Tensor, root: Tensor, eps: float) -> Tensor:
    """Whether there is a root of this covariance: all is finite, something varies, and squares are in range."""
    var = cov.diagonal()
    largest, (least, most) = var.amax() + eps, range_of_variance(len(var), cov.dtype)
    finite = (mean.abs().amax() < math.inf) & (root.abs().amax() < math.inf)
    return finite & (largest > least) & (largest < most) & varies(var, pooled(mean, len(var)).square())


def range_of_variance(features: int, dtype: torch.dtype) -> tuple[float, float]:
    """Between which the largest variance has to be, so that the norm of the covariance can be squared."""
    numbers = torch.finfo(dtype)
    return features * numbers.tiny**0.5, numbers.max**0.5 / features


def pooled(mean: Tensor, block: int) -> Tensor:
    """The root of the mean square over the blocks, ``(block,)``, or the mean itself where there is one."""
    return mean if len(mean) == block else mean.reshape(-1, block).square().mean(0).sqrt()


class _Step(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        num_iters: int,
        block: int,
        other_mean: Tensor | None,
        other_root: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        with without_autocast(x.device.type):
            eye = _eye(block, x.dtype, x.device)
            mean = x.mean(0)
            centred = x - mean
            part = centred.reshape(-1, block)
            cov = torch.mm(part.T, part).div_(len(part))
            a = torch.add(cov, eye, alpha=eps)
            norm = torch.linalg.vector_norm(a)
            basis, stages = chebyshev_stages(a.div_(norm), eye, num_iters)
            root, counts = stages[-1] * norm.rsqrt(), None
            if other_mean is not None and other_root is not None:
                counts = usable(mean, cov, root, eps)
                mean, root = torch.where(counts, mean, other_mean), torch.where(counts, root, other_root)
                centred = x - mean
            folded = _times(weight, root)
            y = torch.mm(centred, folded.T) if bias is None else torch.addmm(bias, centred, folded.T)
        ctx.save_for_backward(x, weight, bias, centred, a, norm, root, folded, counts, mean, *basis, *stages)
        ctx.rest = eps, num_iters, len(basis)
        ctx.mark_non_differentiable(mean, cov, root, *(() if counts is None else (counts,)))
        return y, mean, cov, root, counts

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grad.device.type):  # somebody may call backward inside of autocast
            own = _by_parts(ctx, grad) if torch.is_grad_enabled() else _gradients(ctx, grad)
        return *own, *[None] * 5


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of x, weight and bias."""
    _, weight, _, centred, a, norm, root, folded, counts, _, *kept = ctx.saved_tensors
    _, num_iters, count = ctx.rest
    for_x, _, for_bias, *_ = ctx.needs_input_grad
    grad_folded = torch.mm(grad.T, centred)
    grad_weight, grad_x = _times(grad_folded, root), None
    if for_x:
        block = len(root)
        of_root = torch.mm(weight.reshape(-1, block).T, grad_folded.reshape(-1, block))
        of_root = (of_root + of_root.T).mul_(0.5)
        of_a = chebyshev_gradient(of_root, kept[:count], kept[count:], num_iters).mul_(norm.rsqrt())
        # a is divided by its norm, and the root by the norm's root: both pull on the norm.
        of_norm = (of_a * a).sum() + (of_root * root).sum() * 0.5
        of_cov = of_a.addcmul_(a, of_norm, value=-1).div_(norm)
        straight, part = torch.mm(grad, folded).reshape(-1, block), centred.reshape(-1, block)
        own = torch.addmm(straight, part, of_cov, alpha=2 / len(part)).reshape(centred.shape)
        own = own - own.mean(0)
        grad_x = own if counts is None else torch.where(counts, own, straight.reshape(centred.shape))
    return grad_x, grad_weight, grad.sum(0) if for_bias else None


def _by_parts(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The same with a gradient of its own, from operators that have one.

    Of views: x may depend on the weight, and that way is for others to go.
    """
    x, weight = (value.view_as(value) for value in ctx.saved_tensors[:2])
    bias = None if ctx.saved_tensors[2] is None else ctx.saved_tensors[2].view_as(ctx.saved_tensors[2])
    eps, num_iters, _ = ctx.rest
    root, counts, mean = (ctx.saved_tensors[place] for place in (6, 8, 9))
    eye = _eye(len(root), x.dtype, x.device)
    centred = x - x.mean(0)
    part = centred.reshape(-1, len(root))
    a = torch.add(part.T @ part / len(part), eye, alpha=eps)
    norm = torch.linalg.vector_norm(a)
    own = chebyshev_stages(a / norm, eye, num_iters)[1][-1] * norm.rsqrt()
    if counts is None:
        root = own
    else:
        centred, root = x - torch.where(counts, x.mean(0), mean), torch.where(counts, own, root)
    y = centred @ _times(weight, root).T
    y = y if bias is None else y + bias
    inputs = [value for value, needed in zip((x, weight, bias), ctx.needs_input_grad, strict=False) if needed]
    found = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad[:3])


def _times(weight: Tensor, root: Tensor) -> Tensor:
    """Every block of the weight's columns times the root."""
    return torch.mm(weight.reshape(-1, len(root)), root).reshape(weight.shape)


@cached_constant
def _eye(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.eye(size, dtype=dtype, device=device)
