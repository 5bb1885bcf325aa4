"""What whitening adds to a training step of every convolution of a network, in operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from netdeconv import WhitenedConv2d
from netdeconv.lab.experiments.cost_flops import whitening_flops

__all__ = ["step_cost"]


@torch.no_grad()
def step_cost(net: nn.Module, images: Tensor) -> dict[str, float]:
    """Operations of whitening over those of the convolution, in an average training step on this batch.

    Refreshes are shared out over the steps between them. Counted on paper: small operators take more time than that.

    Args:
        net: in evaluation mode.
        images: ``(N, C, H, W)``.

    Returns:
        By the path of every :class:`netdeconv.WhitenedConv2d` that the batch reaches, of its first call.
    """
    found: dict[str, float] = {}

    def note(name: str) -> Any:
        def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            assert isinstance(layer, WhitenedConv2d)
            plain = 3 * 2.0 * output.numel() * layer.weight[0].numel()  # forward, gradients of input and weight
            if not layer.whitening.sees_few_rows(inputs[0]):
                found.setdefault(name, sum(whitening_flops(layer, inputs[0]).values()) / plain)

        return count

    layers = [(name, layer) for name, layer in net.named_modules() if isinstance(layer, WhitenedConv2d)]
    handles = [layer.register_forward_hook(note(name)) for name, layer in layers]
    try:
        net(images)
    finally:
        for handle in handles:
            handle.remove()
    return found
