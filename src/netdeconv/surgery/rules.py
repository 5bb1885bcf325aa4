"""Modules that are rewritten as plain torch modules before they are looked at: by the user's rules, and by ours."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn import functional as F

from netdeconv.errors import ConfigError
from netdeconv.surgery.layers import plain_again

__all__ = ["Rule", "SamePadding", "rule_for"]

Rule: TypeAlias = "Callable[[Any], nn.Module | None]"


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
    if "forward" in vars(module) or "weight" not in module._parameters:
        return None
    return _KNOWN.get(f"{type(module).__module__}.{type(module).__name__}")


class SamePadding(nn.Module):
    """Zero padding that depends on the input, so that a strided convolution sees ``ceil(size / stride)`` positions.

    As TensorFlow pads: one more behind than before where it does not come out even.

    Shapes: ``(N, C, *spatial)`` -> the same with larger maps.
    """

    def __init__(self, kernel_size: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride, dilation in zip(
            x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            pads = [total // 2, total - total // 2, *pads]  # F.pad wants the last dimension first
        return F.pad(x, pads)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}"


class Applied(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


def _from_conv_same(conv: Any) -> nn.Module:
    pad = SamePadding(conv.kernel_size, conv.stride, conv.dilation)
    return nn.Sequential(OrderedDict(pad=pad, conv=plain_again(conv)))


def _from_conv_norm(conv: Any) -> nn.Module:
    parts = OrderedDict(conv=plain_again(conv))
    if conv.norm is not None:
        parts["norm"] = conv.norm
    if conv.activation is not None:
        parts["activation"] = conv.activation if isinstance(conv.activation, nn.Module) else Applied(conv.activation)
    return nn.Sequential(parts)


# What a class is rewritten as, by its full name, so that its library need not be installed.
_KNOWN: dict[str, tuple[Rule, str]] = {
    "detectron2.layers.wrappers.Conv2d": (_from_conv_norm, "as convolution, norm and activation"),
    "timm.layers.conv2d_same.Conv2dSame": (_from_conv_same, "as padding and convolution"),
    "timm.layers.linear.Linear": (plain_again, "as linear layer: its cast is for scripting only"),
}
