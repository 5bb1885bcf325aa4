"""A training step of a linear layer whitened by the root of the batch itself, as one autograd node."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from netdeconv.functional.polynomials import chebyshev_gradient, chebyshev_stages
from netdeconv.functional.precision import without_autocast
from netdeconv.functional.tracing import cached_constant

__all__ = ["whitened_linear"]


def whitened_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float, num_iters: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(x - mean) D W^T + b``, with D the root of these rows' covariance and the gradient through both.

    What :func:`netdeconv.functional.patch_moments`, :func:`netdeconv.functional.inverse_sqrt` with ``"chebyshev"`` and
    :func:`netdeconv.functional.fold` say, in a third of the operators. Differentiable any number of times.

    Shapes: x ``(rows, in)``, weight ``(out, in)``, bias ``(out,)`` or ``None``, all of one dtype, float32 or float64 ->
    ``(rows, out)``, and without gradient mean ``(in,)``, covariance and D ``(in, in)``.
    """
    y, mean, cov, root = _Step.apply(x, weight, bias, eps, num_iters)
    return y, mean, cov, root


class _Step(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, num_iters: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        eye = _eye(x.shape[1], x.dtype, x.device)
        mean = x.mean(0)
        centred = x - mean
        cov = torch.mm(centred.T, centred).div_(len(x))
        a = torch.add(cov, eye, alpha=eps)
        norm = torch.linalg.vector_norm(a)
        basis, stages = chebyshev_stages(a.div_(norm), eye, num_iters)
        root = stages[-1] * norm.rsqrt()
        folded = torch.mm(weight, root)
        y = torch.mm(centred, folded.T) if bias is None else torch.addmm(bias, centred, folded.T)
        ctx.save_for_backward(x, weight, bias, centred, a, norm, root, folded, *basis, *stages)
        ctx.rest = eps, num_iters, len(basis)
        ctx.mark_non_differentiable(mean, cov, root)
        return y, mean, cov, root

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grad.device.type):  # somebody may call backward inside of autocast
            own = _by_parts(ctx, grad) if torch.is_grad_enabled() else _gradients(ctx, grad)
        return *own, None, None


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of x, weight and bias."""
    _, weight, _, centred, a, norm, root, folded, *kept = ctx.saved_tensors
    _, num_iters, count = ctx.rest
    for_x, _, for_bias, *_ = ctx.needs_input_grad
    grad_folded = torch.mm(grad.T, centred)
    grad_weight, grad_x = torch.mm(grad_folded, root), None
    if for_x:
        of_root = torch.mm(weight.T, grad_folded)
        of_root = (of_root + of_root.T).mul_(0.5)
        of_a = chebyshev_gradient(of_root, kept[:count], kept[count:], num_iters).mul_(norm.rsqrt())
        # a is divided by its norm, and the root by the norm's root: both pull on the norm.
        of_norm = torch.dot(of_a.flatten(), a.flatten()) + torch.dot(of_root.flatten(), root.flatten()).mul_(0.5)
        of_cov = of_a.addcmul_(a, of_norm, value=-1).div_(norm)
        grad_x = torch.addmm(torch.mm(grad, folded), centred, of_cov, alpha=2 / len(centred))
        grad_x.sub_(grad_x.mean(0))
    return grad_x, grad_weight, grad.sum(0) if for_bias else None


def _by_parts(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The same with a gradient of its own, from operators that have one.

    Of views: x may depend on the weight, and that way is for others to go.
    """
    x, weight = (value.view_as(value) for value in ctx.saved_tensors[:2])
    bias = None if ctx.saved_tensors[2] is None else ctx.saved_tensors[2].view_as(ctx.saved_tensors[2])
    eps, num_iters, _ = ctx.rest
    eye = _eye(x.shape[1], x.dtype, x.device)
    centred = x - x.mean(0)
    a = torch.add(centred.T @ centred / len(x), eye, alpha=eps)
    norm = torch.linalg.vector_norm(a)
    root = chebyshev_stages(a / norm, eye, num_iters)[1][-1] * norm.rsqrt()
    y = centred @ (weight @ root).T
    y = y if bias is None else y + bias
    inputs = [value for value, needed in zip((x, weight, bias), ctx.needs_input_grad, strict=False) if needed]
    found = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad[:3])


@cached_constant
def _eye(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.eye(size, dtype=dtype, device=device)
