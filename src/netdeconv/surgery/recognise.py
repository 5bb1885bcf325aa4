"""What a module is to the conversion: a layer to whiten, a batch norm to remove, one that is rewritten, or none."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from netdeconv.errors import ConfigError
from netdeconv.nn import ChannelWhitening, WhitenedConv1d, WhitenedConv2d, WhitenedConv3d, WhitenedLinear, Whitening
from netdeconv.nn.layer import WhitenedLayer

__all__ = [
    "LAYERS",
    "BatchNorm",
    "Clone",
    "Rule",
    "SamePadding",
    "batch_norm",
    "is_layer",
    "is_like_batch_norm",
    "is_quantised",
    "is_sequence",
    "is_whitened",
    "rule_for",
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


def is_whitened(module: nn.Module) -> bool:
    """Whether it whitens already, or is what does so in a layer."""
    return isinstance(module, (WhitenedLayer, ChannelWhitening, Whitening))


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
    """Returns a clone of its input.

    A batch norm gives a new tensor. Where it goes, an operation in place after it would change its input, which others
    may read: a shortcut, a hook, autograd.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


@dataclasses.dataclass(frozen=True)
class BatchNorm:
    """What there is to know of a recognised batch norm.

    Attributes:
        after: the activations in it that have to stay.
        copies: it has to go on giving a new tensor, as something writes to it.
    """

    after: dict[str, nn.Module]
    copies: bool = True

    def __call__(self, norm: nn.Module) -> nn.Module:
        """What is left when the normalisation goes."""
        new = any(not isinstance(child, (nn.Identity, nn.Dropout)) for child in self.after.values())
        first: nn.Module = Clone() if self.copies and not new else nn.Identity()
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


Rule: TypeAlias = "Callable[[Any], nn.Module | None]"


class SamePadding(nn.Module):
    """Zero padding that depends on the input, so that a strided convolution sees ``ceil(size / stride)`` positions.

    As TensorFlow pads: one more behind than before where it does not come out even.

    Shapes: ``(N, C, H, W)`` -> ``(N, C, H', W')``.
    """

    def __init__(self, kernel_size: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride, dilation in zip(
            reversed(x.shape[-len(self.kernel_size) :]),
            reversed(self.kernel_size),
            reversed(self.stride),
            reversed(self.dilation),
            strict=True,
        ):
            total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            pads += [total // 2, total - total // 2]
        return F.pad(x, pads)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}"


def rule_for(module: nn.Module, rules: Mapping[type, Rule] | None) -> tuple[Rule, str] | None:
    """The rule for a module's class, the user's before ours, and its name; ``None`` when there is none.

    Raises:
        ConfigError: ``rules`` is not a mapping from classes to functions.
    """
    for kind, rule in (rules or {}).items():
        if not (isinstance(kind, type) and callable(rule)):
            raise ConfigError(
                f"rules: expected module classes as keys and functions of one module as values, got {kind!r}: {rule!r}."
            )
    for kind in type(module).__mro__:
        if rules and kind in rules:
            return rules[kind], f"rule for {kind.__name__}"
    kind = type(module)
    known = _KNOWN.get(f"{kind.__module__}.{kind.__name__}")
    if known is None or "forward" in vars(module) or "weight" not in module._parameters:
        return None
    return known


class Applied(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


def _plain_conv(conv: Any, padding: Any) -> nn.Conv2d:
    """torch's convolution with the parameters of another."""
    plain = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        padding,
        conv.dilation,
        conv.groups,
        bias=conv.bias is not None,
        device="meta",
    )
    plain.weight, plain.bias = conv.weight, conv.bias
    return plain


def _from_conv_same(conv: Any) -> nn.Module:
    pad = SamePadding(conv.kernel_size, conv.stride, conv.dilation)
    return nn.Sequential(OrderedDict(pad=pad, conv=_plain_conv(conv, 0)))


def _from_conv_norm(conv: Any) -> nn.Module:
    parts: OrderedDict[str, nn.Module] = OrderedDict(conv=_plain_conv(conv, conv.padding))
    if conv.norm is not None:
        parts["norm"] = conv.norm
    if conv.activation is not None:
        function = conv.activation
        parts["activation"] = function if isinstance(function, nn.Module) else Applied(function)
    return nn.Sequential(parts)


def _from_linear(linear: Any) -> nn.Module:
    plain = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    plain.weight, plain.bias = linear.weight, linear.bias
    return plain


# What a class is rewritten as, by its full name, so that its library need not be installed.
_KNOWN: dict[str, tuple[Rule, str]] = {
    "detectron2.layers.wrappers.Conv2d": (_from_conv_norm, "as convolution, norm and activation"),
    "timm.layers.conv2d_same.Conv2dSame": (_from_conv_same, "as padding and convolution"),
    "timm.layers.linear.Linear": (_from_linear, "as linear layer: its cast is for scripting only"),
}
