"""What a module is to the conversion: a layer to whiten, a batch norm to remove, or a reason for neither."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from netdeconv.nn import WhitenedConv1d, WhitenedConv2d, WhitenedConv3d, WhitenedLinear, Whitening
from netdeconv.nn.layer import WhitenedLayer

__all__ = [
    "LAYERS",
    "BatchNorm",
    "Clone",
    "batch_norm",
    "is_layer",
    "is_like_batch_norm",
    "is_quantised",
    "is_sequence",
    "why_not_whiten",
]

_PLAIN: tuple[type, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
# Whose forward is known.
LAYERS: tuple[Any, ...] = (
    *_PLAIN, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    WhitenedConv1d, WhitenedConv2d, WhitenedConv3d, WhitenedLinear,
)  # fmt: skip
_BATCH_NORMS: tuple[type, ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# What a subclass may define and still be the same layer to everybody who calls it.
_BUILDING = {"__init__", "__repr__", "extra_repr", "reset_parameters", "reset_running_stats", "__constants__"}
_PROBE_TOLERANCE = 1e-4  # float32, numbers of order one


def is_layer(module: nn.Module) -> bool:
    """Whether this is some kind of convolution or linear layer."""
    if isinstance(module, (*_PLAIN, _ConvTransposeNd)):
        return True
    name = type(module).__name__.lower()
    named = is_quantised(module) and ("conv" in name or name.endswith("linear"))
    return named and not any(is_layer(child) for child in module.children())


def is_sequence(module: nn.Module) -> bool:
    """Whether calling this calls its members in order, each with what the one before gives."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def why_not_whiten(module: Any) -> str | None:
    """The reason this layer cannot be replaced by a whitened one; ``None`` when it can."""
    kind = type(module)
    if isinstance(module, WhitenedLayer):
        return "whitened already"
    if is_quantised(module):
        return "quantised: convert the floating point network and quantise that"
    if isinstance(module, _ConvTransposeNd):
        # Its output at a position is made of the taps that reach it, others at the border and at every offset of the
        # stride, and so would be what the mean folds to: no plain transposed convolution with a bias equals it.
        return "transposed convolution: the mean of its input does not fold into a bias"
    if hasattr(module, "parametrizations"):
        return "its weight is parametrised (torch.nn.utils.parametrize), which whitening weights would not respect"
    if isinstance(module, LazyModuleMixin) or is_lazy(module.weight):
        return "lazy: run one batch through the model first, so that the shapes are known"
    if "weight" not in module._parameters:
        return "its weight is computed (weight_norm, spectral_norm, pruning, ...), not a parameter"
    changed = _changed_members(module, _PLAIN)
    if changed:
        return f"{kind.__module__}.{kind.__name__} is not torch's own layer (it defines {changed}); see rules="
    if not module.weight.is_floating_point():
        return f"weights of type {module.weight.dtype} are not real numbers"
    if isinstance(module, nn.Linear) and 0 in (module.in_features, module.out_features):
        return "no features"
    return None


def is_like_batch_norm(module: nn.Module) -> bool:
    """Whether this keeps running mean and variance of channels, as batch normalisation does."""
    if isinstance(module, (nn.modules.instancenorm._InstanceNorm, Whitening)):
        return False
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or (
        all(isinstance(getattr(module, name, None), Tensor) for name in ("running_mean", "running_var"))
        and module.running_var.dim() == 1  # type: ignore[operator]
    )


class Clone(nn.Identity):
    """Hands on a copy of its input.

    A batch norm gives a new tensor. Where it goes and others may still read its input, an operation in place
    after it, such as ``ReLU(inplace=True)``, would change what they read.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


@dataclasses.dataclass(frozen=True)
class BatchNorm:
    """What there is to know of a recognised batch norm: the activations in it that have to stay."""

    after: dict[str, nn.Module]

    def without(self, alone: bool) -> nn.Module:
        """What is left when the normalisation goes; ``alone`` when nobody else reads its input."""
        first: nn.Module = nn.Identity() if alone else Clone()
        return nn.Sequential(OrderedDict(norm=first, **self.after)) if self.after else first


def batch_norm(module: Any) -> BatchNorm | str:
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
    after = {name: child for name, child in module.named_children() if child is not None}
    if kind in _BATCH_NORMS:
        return BatchNorm(after) if not after else "it holds modules that torch's batch norm does not run"
    if not _is_affine_then(module, list(after.values())):
        return f"{kind.__module__}.{kind.__name__} does more than normalise and run its children; see rules="
    return BatchNorm(after)


def _is_affine_then(module: Any, after: list[nn.Module]) -> bool:
    """Try it: does a copy with random statistics compute the formula?"""
    random = torch.Generator().manual_seed(0)
    try:
        probe = copy.deepcopy(module).to_empty(device="cpu").float().eval()
        for tensor in (*probe.parameters(), *probe.buffers()):
            tensor.data = torch.rand(tensor.shape, generator=random, device="cpu").add_(0.5).to(tensor.dtype)
    except Exception:  # whatever a foreign class does here, it is not known to be a batch norm
        return False
    weight, bias = getattr(probe, "weight", None), getattr(probe, "bias", None)
    scale = (probe.running_var + getattr(probe, "eps", 0.0)).rsqrt() * (1.0 if weight is None else weight)
    shift = (0.0 if bias is None else bias) - scale * probe.running_mean
    for dims in (2, 1, 0, 3):
        x = torch.randn(2, scale.numel(), *[3] * dims, generator=random, device="cpu")
        shape = (1, -1, *[1] * dims)
        try:
            with torch.no_grad(), torch.device("cpu"):  # for what its forward may make
                got = probe(x.clone())
        except Exception:
            continue
        with torch.no_grad(), torch.device("cpu"):
            expected = x * scale.reshape(shape) + shift.reshape(shape)
            for child in probe.children():
                expected = child(expected)
        return isinstance(got, Tensor) and got.shape == expected.shape and _close(got, expected)
    return False


def _close(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got, expected, rtol=_PROBE_TOLERANCE, atol=_PROBE_TOLERANCE)


def _changed_members(module: nn.Module, known: tuple[type, ...]) -> str:
    """Names of methods that the module's classes define beyond torch's; and of a forward set on the object."""
    names = {"forward"} & set(vars(module))
    for base in type(module).__mro__:
        if base in known:
            break
        names |= {
            name
            for name, value in vars(base).items()
            if name not in _BUILDING and (inspect.isfunction(value) or isinstance(value, property))
        }
    return ", ".join(sorted(names))


def is_quantised(module: nn.Module) -> bool:
    """Whether this is a class of torch's quantisation, or made for it."""
    place = type(module).__module__
    return any(part in place for part in (".quantized", "ao.nn.qat", "nn.intrinsic", "quantizable"))
