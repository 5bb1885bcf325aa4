"""Layers behind a global pooling: they see one row per image, too few for a covariance."""

from __future__ import annotations

from typing import Any

from torch import nn

from netdeconv.surgery.recognise import is_like_batch_norm, is_sequence

__all__ = ["behind_global_pooling"]

_POOLINGS: tuple[Any, ...] = (
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip

# What these classes, of whatever library, give the means of all channels to.
_SQUEEZED = {
    "SqueezeExcitation": ("fc1", "fc2"),  # torchvision's, and the zoo's
    "SqueezeExcite": ("conv_reduce", "conv_expand"),  # timm's
    "SEModule": ("fc1", "fc2"),  # timm's
    "EffectiveSEModule": ("fc",),  # timm's
}
# Sequences that run their members in order, and afterwards do something else.
_SEQUENCES = ("ASPPPooling",)  # torchvision's DeepLab
# Of torch, what takes every number, or every pixel, by itself.
_BETWEEN = ("torch.nn.modules.activation", "torch.nn.modules.dropout", "torch.nn.modules.normalization")


def behind_global_pooling(model: nn.Module) -> set[nn.Module]:
    """1x1 convolutions whose maps are seen to be of one pixel: in sequences, and in squeeze and excitation.

    Seen in the structure, nothing is run; what it does not show, the layers notice themselves
    (:meth:`netdeconv.nn.Whitening.sees_few_rows`).
    """
    found: set[nn.Module] = set()
    for module in model.modules():
        kind = type(module).__name__
        if is_sequence(module) or kind in _SEQUENCES:
            _through(module, False, found)
        children = dict(module.named_children())
        found |= {children[name] for name in _SQUEEZED.get(kind, ()) if _is_pointwise(children.get(name))}
    return found


def _through(module: Any, pooled: bool, found: set[nn.Module]) -> bool:
    """Whether a module puts out a map of one pixel, if it gets one or not; notes convolutions that get one."""
    if isinstance(module, _POOLINGS):
        size = module.output_size
        return pooled or (set(size) if isinstance(size, (tuple, list)) else {size}) == {1}
    if _is_pointwise(module):
        if pooled:
            found.add(module)
        return pooled
    if is_sequence(module) or type(module).__name__ in _SEQUENCES:
        for child in module:  # a member may stand there twice
            pooled = _through(child, pooled, found)
        return pooled and is_sequence(module)
    harmless = is_like_batch_norm(module) or isinstance(module, nn.Identity) or type(module).__module__ in _BETWEEN
    return pooled and harmless


def _is_pointwise(module: Any) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and set(module.kernel_size) == {1}
