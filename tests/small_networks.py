"""Blocks in which batch norms stand in every place, random networks made of them, and statistics for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from netdeconv.nn import Whitening


class ConvNormAct(nn.Module):
    """The usual order, with an activation in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.norm(x)
        return F.relu_(x)


class PreActivation(nn.Module):
    """Normalisation before the layer, and a shortcut that reads what it read."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.act(self.norm(x)))


class TwoNormsOfOne(nn.Module):
    """One convolution, two batch norms of its output, and operations in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        self.first, self.second = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        a = F.relu_(self.first(y))
        b = self.second(y)
        b += a
        return b


class Shortcut(nn.Module):
    """A residual block that adds in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.BatchNorm2d(channels)
        self.down = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x))
        out += self.down(x)
        return out


class Squeeze(nn.Module):
    """Squeeze and excitation by linear layers with a batch norm between."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(channels, 4), nn.BatchNorm1d(4), nn.Linear(4, channels)

    def forward(self, x: Tensor) -> Tensor:
        s = F.relu_(self.norm(self.fc1(x.mean((2, 3)))))
        return x * self.fc2(s).sigmoid()[:, :, None, None]


class Optional(nn.Module):
    """A batch norm under a condition, and kept features."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.use = True

    def forward(self, x: Tensor) -> Tensor:
        kept = y = self.conv(x)
        if self.use:
            y = self.norm(y)
        y.clamp_(min=0)
        return y - kept


class ReadTwice(nn.Module):
    """The layer's output is read beside the batch norm, in the statement that reads it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = F.relu_(self.norm(x)) - x
        return x


class Concatenate(nn.Module):
    """Branches side by side: 2 C channels, brought back to C."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.left, self.right = ConvNormAct(channels), PreActivation(channels)
        self.merge = nn.Sequential(
            nn.BatchNorm2d(2 * channels), nn.ReLU(inplace=True), nn.Conv2d(2 * channels, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(torch.cat([self.left(x), self.right(x)], 1))


BLOCKS = (ConvNormAct, PreActivation, TwoNormsOfOne, Shortcut, Squeeze, Optional, ReadTwice, Concatenate)


def random_network(seed: int) -> nn.Module:
    """A few blocks in random order, some of them twice."""
    random = torch.Generator().manual_seed(seed)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=random))

    torch.manual_seed(seed)
    channels = 2 + below(6)
    blocks: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1)]
    for _ in range(2 + below(4)):
        again = len(blocks) > 1 and below(4) == 0
        blocks.append(blocks[1 + below(len(blocks) - 1)] if again else BLOCKS[below(len(BLOCKS))](channels))
    return nn.Sequential(*blocks)


def randomise_statistics(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch norm statistics, scales and shifts that are not trivial, as training does."""
    random = torch.Generator().manual_seed(seed)

    def draw(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=random, dtype=torch.float64).to(like.dtype) * (high - low) + low

    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_var", None) is None:
                continue
            module.running_mean.copy_(draw(module.running_mean, -0.5, 0.5))
            module.running_var.copy_(draw(module.running_var, 0.5, 1.5))
            if module.weight is not None:
                module.weight.copy_(draw(module.weight, 0.7, 1.3))
                module.bias.copy_(draw(module.bias, -0.5, 0.5))
    return model


def batch_norms(model: nn.Module) -> list[str]:
    """Paths of everything that calls itself a batch norm, or has a running variance and is no whitening."""
    return [
        path
        for path, module in model.named_modules()
        if "batchnorm" in type(module).__name__.lower()
        or (hasattr(module, "running_var") and not isinstance(module, Whitening))
    ]
