"""A small vision transformer, of plain linear layers, for images of 32x32 pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["SmallViT"]


class _Attention(nn.Module):
    """Self-attention whose projections are layers that are called, so that they can be whitened."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(size, 3 * size)
        self.out = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    """Attention, then two linear layers, each behind a layer norm and beside a shortcut."""

    def __init__(self, size: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(size), _Attention(size, heads)
        self.norm2 = nn.LayerNorm(size)
        self.mlp = nn.Sequential(nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, size))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SmallViT(nn.Module):
    """A vision transformer with layer norm in front of every part, and the mean of the tokens at the end.

    Shape:
        ``(N, in_channels, image_size, image_size)`` to ``(N, num_classes)``.

    Args:
        in_channels: channels of the images.
        num_classes: outputs.
        image_size: height and width of the images, a multiple of the patch size.
        width: of a head; a token has four.
        depth: blocks.
        patch: height and width of a patch, which becomes a token.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        image_size: int = 32,
        width: int = 48,
        depth: int = 6,
        patch: int = 4,
    ) -> None:
        super().__init__()
        heads = 4
        size = heads * width
        self.patches = nn.Conv2d(in_channels, size, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn((image_size // patch) ** 2, size))
        self.blocks = nn.Sequential(*(_Block(size, heads, 2 * size) for _ in range(depth)))
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))
