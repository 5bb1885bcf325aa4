"""Batch norms of any library: telling them, what they compute in evaluation, and what stands in their place."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from netdeconv.errors import ShapeError
from netdeconv.functional.precision import exact
from netdeconv.nn import Whitening
from netdeconv.surgery.layers import is_quantised

__all__ = ["BatchNorm", "ChannelAffine", "Clone", "batch_norm", "is_like_batch_norm", "scale_and_shift"]

_TORCHS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_PROBE_TOLERANCE = 1e-4  # float32, numbers of order one


def is_like_batch_norm(module: nn.Module) -> bool:
    """Whether this keeps running mean and variance of channels, as batch normalisation does."""
    if isinstance(module, (nn.modules.instancenorm._InstanceNorm, Whitening)):
        return False
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or (
        all(isinstance(getattr(module, name, None), Tensor) for name in ("running_mean", "running_var"))
        and module.running_var.dim() == 1  # type: ignore[operator]
    )


class Clone(nn.Identity):
    """Returns a clone of its input.

    A batch norm gives a new tensor. Where it goes, an operation in place after it would change its input, which others
    may read: a shortcut, a hook, autograd.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


class ChannelAffine(nn.Module):
    """``y = weight * x + bias`` per channel: the same in training and evaluation, no statistics.

    Shapes: ``(N, C, *)`` -> the same; weight and bias ``(C,)``, both parameters.

    Raises:
        ShapeError: x does not have C channels.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        channels = self.weight.numel()
        if x.dim() < 2 or x.shape[1] != channels:
            raise ShapeError(f"ChannelAffine: expected x of shape (N, {channels}, *), got {tuple(x.shape)}.")
        shape = (1, -1, *[1] * (x.dim() - 2))
        return x * self.weight.reshape(shape).to(x.dtype) + self.bias.reshape(shape).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}"


def scale_and_shift(norm: Any) -> tuple[Tensor, Tensor] | None:
    """Scale and shift in float64 that a batch norm applies in evaluation; ``None`` without running statistics.

    ``scale = weight / sqrt(running_var + eps)``, ``shift = bias - scale * running_mean``.
    """
    if norm.running_mean is None or norm.running_var is None:
        return None
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    scale = torch.rsqrt(exact(norm.running_var.detach()) + getattr(norm, "eps", 0.0))
    if weight is not None:
        scale = scale * exact(weight.detach())
    shift = -scale * exact(norm.running_mean.detach())
    return scale, shift if bias is None else shift + exact(bias.detach())


@dataclasses.dataclass(frozen=True)
class BatchNorm:
    """What there is to know of a recognised batch norm; called, what stands in its place.

    Attributes:
        after: the activations in it that have to stay.
        copies: it has to go on giving a new tensor, as something writes to it.
    """

    after: dict[str, nn.Module]
    copies: bool = True

    def __call__(self, norm: nn.Module) -> nn.Module:
        new = any(not isinstance(child, (nn.Identity, nn.Dropout)) for child in self.after.values())
        return self.around(Clone() if self.copies and not new else nn.Identity(), "norm")

    def around(self, first: nn.Module, name: str) -> nn.Module:
        """This in the place of the normalisation, with the activations."""
        return nn.Sequential(OrderedDict({name: first, **self.after})) if self.after else first


def batch_norm(module: nn.Module) -> BatchNorm | str:
    """A batch norm that is ``children(scale * x + shift)`` in evaluation; or why it is not known to be.

    torch's own classes are known. Any other is run on random numbers with random statistics, and has to give
    what the formula gives: so variants of libraries that this one never heard of are handled, and those
    that do more than they show are not.
    """
    kind = type(module)
    if isinstance(module, LazyModuleMixin):
        return "lazy: run one batch through the model first, so that the shapes are known"
    if is_quantised(module):
        return "quantised: convert the floating point network and quantise that"
    if hasattr(module, "parametrizations"):
        return "parametrised (torch.nn.utils.parametrize)"
    if "forward" in vars(module):
        return "its forward was replaced on the object"
    after = dict(module.named_children())
    if kind in _TORCHS:
        return BatchNorm(after) if not after else "it holds modules that torch's batch norm does not run"
    if not _computes_the_formula(module):
        return f"{kind.__module__}.{kind.__name__} does more than normalise and run its children; see rules="
    return BatchNorm(after)


def _computes_the_formula(module: nn.Module) -> bool:
    """Try it with a copy that has random statistics; whatever a foreign class raises, it is not known then."""
    random = torch.Generator().manual_seed(0)
    with contextlib.suppress(Exception):
        probe: Any = copy.deepcopy(module).to_empty(device="cpu").float().eval()
        for tensor in (*probe.parameters(), *probe.buffers()):
            tensor.data = torch.rand(tensor.shape, generator=random, device="cpu").add_(0.5).to(tensor.dtype)
        scale, shift = (value.float() for value in scale_and_shift(probe) or ())
        for dims in (2, 1, 0, 3):
            x = torch.randn(2, scale.numel(), *[3] * dims, generator=random, device="cpu")
            with contextlib.suppress(Exception), torch.no_grad(), torch.device("cpu"):  # for what its forward may make
                got, expected = probe(x.clone()), ChannelAffine(scale, shift)(x)
                for child in probe.children():
                    expected = child(expected)
                near = torch.allclose(got, expected, rtol=_PROBE_TOLERANCE, atol=_PROBE_TOLERANCE)
                return bool(got.shape == expected.shape and near)
    return False
