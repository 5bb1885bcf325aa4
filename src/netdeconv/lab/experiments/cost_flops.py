"""Floating point operations of a convolution and of its whitening, counted on paper; a multiplication and an addition
are two."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from netdeconv import WhitenedConv2d, WhiteningConfig

__all__ = ["Convolution", "convolutions", "whitening_flops"]

# n x n products of a root by its Newton-Schulz steps, where the library takes another map; the recurrence less the
# trivial ones takes 3 for every step after the first.
_PRODUCTS = {1: 0, 2: 2, 3: 3, 5: 6, 15: 17}
# Of every number that the variance of the channels is of: mean, difference, square and sum, and its gradient.
_SCALE = 4 + 3


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution of a network, and how often the network has one like it.

    Args:
        channels, outputs, kernel, stride, padding, groups: as in :class:`torch.nn.Conv2d`; square.
        size: height and width of its input.
        count: layers like it.
    """

    channels: int
    outputs: int
    kernel: int
    stride: int
    padding: int
    groups: int
    size: int
    count: int = 1

    @property
    def name(self) -> str:
        """E.g. ``64 to 128, 3x3, map 16``."""
        more = (f" / {self.stride}" if self.stride > 1 else "") + (f", {self.groups} groups" if self.groups > 1 else "")
        return f"{self.channels} to {self.outputs}, {self.kernel}x{self.kernel}{more}, map {self.size}"

    @property
    def out_size(self) -> int:
        """Height and width of its output."""
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    def plain(self, *, bias: bool = True) -> nn.Conv2d:
        """The layer with new weights."""
        return nn.Conv2d(**self._arguments, bias=bias)

    def whitened(self, config: WhiteningConfig) -> WhitenedConv2d:
        """The same, whitened."""
        return WhitenedConv2d(**self._arguments, whitening=config)

    @property
    def _arguments(self) -> dict[str, Any]:
        return {
            "in_channels": self.channels,
            "out_channels": self.outputs,
            "kernel_size": self.kernel,
            "stride": self.stride,
            "padding": self.padding,
            "groups": self.groups,
        }

    def flops(self, batch: int) -> float:
        """Of its training step: forward, gradient of the input, gradient of the weight."""
        taps = self.channels // self.groups * self.kernel**2
        return 3 * 2.0 * batch * self.out_size**2 * self.outputs * taps


def convolutions(net: nn.Module, size: int) -> list[Convolution]:
    """The different convolutions of a network that sees images of ``size`` x ``size``, in their order."""
    found: dict[Convolution, int] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        one = Convolution(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size[0],
            layer.stride[0],
            int(layer.padding[0]),
            layer.groups,
            inputs[0].shape[-1],
        )
        found[one] = found.get(one, 0) + 1

    hooks = [m.register_forward_hook(note) for m in net.modules() if isinstance(m, nn.Conv2d)]
    was = net.training
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, 3, size, size))
    finally:
        net.train(was)
        for hook in hooks:
            hook.remove()
    return [dataclasses.replace(one, count=count) for one, count in found.items()]


def whitening_flops(layer: WhitenedConv2d, x: Tensor) -> dict[str, float]:
    """What whitening adds to a training step on average over its steps, in steady state.

    ``moments``: the products of the sampled patches, and, with gradient, those back to the patches. ``root``: the
    n x n products, twice as many again with gradient. Both are shared out over ``update_every`` steps. ``fold``: root
    times weight, the gradient of the weight, and, with gradient, that of the root; the mean of all patches, one pass
    over the input, where it does not come from the sample; and the variance of the channels where they are scaled.

    Args:
        layer: whitened. Of very few rows the library takes the cheaper root of their Gram matrix, which is not
            counted here.
        x: input, for its shape.
    """
    config = layer.whitening.config
    rows = len(layer.whitening.estimator.sample(x, max_samples=config.max_samples).rows)
    through = config.differentiable
    sizes = _block_sizes(layer)
    moments = sum(2.0 * rows * n**2 * blocks for n, blocks, _ in sizes)
    root = sum(2.0 * _products(config) * n**3 * roots for n, _, roots in sizes)
    fold = sum(2.0 * layer.out_channels // layer.groups * n**2 * blocks for n, blocks, _ in sizes)
    of_maps = 0.0 if config.sampling == "corner" else float(x.numel())
    if config.scale:
        of_maps += _SCALE * layer.in_channels * layer.whitening.estimator.variance_of(x)[2]
    assert config.update_every is not None
    return {
        "moments": moments * (3 if through else 1) / config.update_every,
        "root": root * (3 if through else 1) / config.update_every,
        "fold": fold * (3 if through else 2) + of_maps,
    }


def _products(config: WhiteningConfig) -> int:
    assert config.num_iters is not None
    recurrence = 3 * (config.num_iters - 1)
    return recurrence if config.solver == "newton_schulz" else _PRODUCTS.get(config.num_iters, recurrence)


def _block_sizes(layer: WhitenedConv2d) -> list[tuple[int, int, int]]:
    """For each size of block: its features, how many blocks there are of it, and how many roots they share."""
    blocks = layer.whitening.blocks
    return [(size, count * blocks.groups, blocks.groups) for count, size in blocks.parts]
