"""From a trained whitened network to one of plain layers, for evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from netdeconv.errors import ConfigError, NumericalError
from netdeconv.functional import fold
from netdeconv.nn import ChannelWhitening
from netdeconv.nn.layer import WhitenedLayer
from netdeconv.surgery.batches import max_relative_error, run_batch
from netdeconv.surgery.first_run import FirstRun
from netdeconv.surgery.layers import plain_twin
from netdeconv.surgery.transplant import become, copied

__all__ = ["ChannelLinear", "check_fused", "fuse"]

Model = TypeVar("Model", bound=nn.Module)


class ChannelLinear(nn.Module):
    """A linear layer over the channels at every position: what a :class:`netdeconv.ChannelWhitening` is fused to.

    Shapes: ``(N, C, *)`` -> ``(N, C', *)``.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear(x.movedim(1, -1)).movedim(-1, 1)
        return output


@torch.no_grad()
def fuse(model: Model) -> Model:
    """A new model for evaluation, made of plain ``nn.ConvNd`` and ``nn.Linear``, that gives the same output.

    Mean and root are folded into the weights once and for all, so that it costs what any network of its
    shape costs, in any runtime. Memory format, device, dtype, ``requires_grad`` and hooks stay. A model without
    whitened layers is copied. The old model is untouched; to train further, keep it.

    Raises:
        ConfigError: the model, or a whitened layer in it, is in training mode; a layer with a forward of its own, or
            with a weight that is computed by a hook, as pruning does; a model that cannot be copied.

    Example:
        >>> import torch, netdeconv
        >>> from netdeconv.zoo import create
        >>> model = netdeconv.convert(create("resnet18", width=0.25))
        >>> _ = model(torch.randn(4, 3, 32, 32))  # training gathers the statistics
        >>> fused = netdeconv.fuse(model.eval())
        >>> type(fused.conv1).__name__
        'Conv2d'
    """
    whitened = [module for module in model.modules() if isinstance(module, (WhitenedLayer, ChannelWhitening))]
    for module in (model, *whitened):
        if module.training:
            where = module.whitening.label if isinstance(module, (WhitenedLayer, ChannelWhitening)) else "the model"
            raise ConfigError(
                f"fuse: expected a model in evaluation mode, got {where} in training mode, where it whitens by the "
                "statistics of the batch and no plain layer equals it. Call model.eval() first."
            )
        if isinstance(module, WhitenedLayer) and not hasattr(module, "parametrizations"):
            _check_weight(module)
    new = copied(model, "fuse")
    FirstRun.remove(new)
    parts: list[nn.Module] = list(new.modules())
    for part in parts:
        if isinstance(part, WhitenedLayer):
            become(part, plain_twin(part))
        elif isinstance(part, ChannelWhitening):
            become(part, _channel_twin(part))
    return new


def _check_weight(layer: WhitenedLayer) -> None:
    """A hook that computes the weight before every call would undo the folding."""
    for name in ("weight", "bias"):
        if name not in layer._parameters:
            raise ConfigError(
                f"fuse: expected whitened layers whose {name} is a parameter, got {layer.whitening.label} with one "
                "that a hook computes (pruning, old style weight_norm). Make it permanent first, for pruning by "
                f"torch.nn.utils.prune.remove(layer, {name!r}), or prune the fused model instead."
            )


def check_fused(
    model: nn.Module,
    fused: nn.Module,
    inputs: Any,
    *,
    tolerance: float = 1e-4,
    call: Callable[[nn.Module, Any], Any] | None = None,
) -> float:
    """Compare a fused model with the one it came from; returns the largest relative error.

    ``max |fused(x) - model(x)| / max |model(x)|`` over the batch ``inputs``, for every tensor of the output.

    Raises:
        ConfigError: one of the two is in training mode.
        NumericalError: the error is larger than ``tolerance``.
    """
    for name, module in (("model", model), ("fused", fused)):
        if any(part.training for part in module.modules()):
            raise ConfigError(
                f"check_fused: expected {name} in evaluation mode, got training mode. Call .eval() first."
            )
    with torch.no_grad():
        error = max_relative_error(run_batch(fused, inputs, call), run_batch(model, inputs, call))
    if not error <= tolerance:
        raise NumericalError(
            f"check_fused: expected a relative error of at most {tolerance:.0e}, got {error:.1e}. In half precision "
            "rounding explains up to some percent; otherwise the two are not the same network."
        )
    return error


def _channel_twin(layer: ChannelWhitening) -> ChannelLinear:
    whitening = layer.whitening
    found = whitening.remembered()
    eye = torch.eye(layer.num_channels, dtype=found.mean.dtype, device=found.mean.device)
    weight, bias = fold(eye, None, found.mean, found.roots, whitening.blocks, found.scale)
    linear = nn.Linear(layer.num_channels, layer.num_channels, device="meta")
    linear.weight, linear.bias = (nn.Parameter(value.clone(), requires_grad=False) for value in (weight, bias))
    return ChannelLinear(linear)
