"""One of every kind of layer, for the tests that all of them must pass, and what these tests share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from netdeconv import (
    ChannelWhitening,
    WhitenedConv1d,
    WhitenedConv2d,
    WhitenedConv3d,
    WhitenedLinear,
    WhiteningConfig,
)
from netdeconv import reference as ref

# The same float32 operations in another order or memory layout.
SAME: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
# One bfloat16 rounding of input, weight and output is 2**-9 = 2e-3 each; sums of 50 products of gain up to 7.6.
BFLOAT16: dict[str, Any] = {"rtol": 0.1, "atol": 0.1}


@dataclasses.dataclass(frozen=True)
class Kind:
    """One layer of the contract and the size of one sample of its input."""

    name: str
    make: Callable[..., nn.Module]
    size: tuple[int, ...]

    @property
    def channel_dim(self) -> int:
        """Which dimension of a sample holds the channels."""
        return len(self.size) - 1 if self.name == "linear" else 0

    @property
    def channels(self) -> int:
        return self.size[self.channel_dim]

    def layer(self, config: WhiteningConfig | None = None, **options: Any) -> Any:
        torch.manual_seed(0)
        return self.make(whitening=config, **options)

    def input(self, batch: int = 6, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Neighbours correlated, mean away from zero, other numbers for every seed."""
        x = torch.randn(batch, *self.size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        if batch > 0:
            x = x + 0.5 * x.roll(1, -1) + 1
        return x.to(dtype)

    def trained(self, steps: int, config: WhiteningConfig | None = None, **options: Any) -> Any:
        layer = self.layer(config, **options)
        for step in range(steps):
            layer(self.input(seed=step))
        return layer


def kind(name: str, layer: Callable[..., nn.Module], size: tuple[int, ...], *args: Any, **options: Any) -> Any:
    return pytest.param(Kind(name, lambda **more: layer(*args, **options, **more), size), id=name)


KINDS = [
    kind("conv1d", WhitenedConv1d, (4, 9), 4, 6, 3, stride=2, padding=1),
    kind("conv2d", WhitenedConv2d, (4, 6, 5), 4, 6, 3, padding="same"),
    kind("pointwise", WhitenedConv2d, (4, 5, 6), 4, 6, 1, stride=(2, 1)),
    kind("grouped", WhitenedConv2d, (4, 5, 6), 4, 6, (2, 3), groups=2, bias=False),
    kind("depthwise", WhitenedConv2d, (4, 5, 6), 4, 4, 3, groups=4, padding=1, padding_mode="reflect"),
    kind("conv3d", WhitenedConv3d, (3, 3, 4, 4), 3, 4, (1, 3, 3), padding=(0, 1, 1)),
    kind("linear", WhitenedLinear, (3, 5), 5, 4),
    kind("channel", ChannelWhitening, (5, 4, 3), 5),
]
BY_NAME: dict[str, Kind] = {param.id: param.values[0] for param in KINDS}
every_kind = pytest.mark.parametrize("kind", KINDS)
# Blocks that leave a rest of 3 and of 5 channels, and samples smaller than the larger inputs.
PARTS = WhiteningConfig(block_size=2, max_samples=100)


_SETTINGS = (
    "block_size", "eps", "num_iters", "momentum", "scale", "update_every", "differentiable", "average",
)  # fmt: skip


def in_reference(layer: Any) -> Any:
    """The reference's layer on this layer's parameters; it looks at all patches of a batch, whatever their number."""
    config = layer.whitening.config
    assert config.sampling != "corner"
    assert config.grouping == "contiguous"
    settings = {name: getattr(config, name) for name in _SETTINGS} | {"piece": layer.whitening.blocks.piece}
    if isinstance(layer, ChannelWhitening):
        return ref.DefaultChannels(layer.num_channels, **settings)
    if isinstance(layer, WhitenedLinear):
        return ref.DefaultLinear(layer.weight, layer.bias, **settings)
    window = dataclasses.asdict(layer.whitening.window)
    del window["kernel_size"]
    options = {"groups": layer.groups, "sampling_stride": 1 if config.sampling == "spread" else config.sampling_stride}
    return ref.DefaultConv(layer.weight, layer.bias, **options, **window, **settings)


def buffers(layer: nn.Module) -> dict[str, Tensor]:
    """Copies of all buffers, to compare with later."""
    return {name: value.clone() for name, value in layer.named_buffers()}


def assert_same_state(one: nn.Module, other: nn.Module, **tolerance: Any) -> None:
    """Equal to the last bit, or within the tolerance."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=name)
