"""The input of every layer of a network, before and after whitening."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from netdeconv.errors import ConfigError
from netdeconv.functional import channel_variance, patch_moments, spread_patches
from netdeconv.functional.precision import exact
from netdeconv.inspect.sparsity import hoyer_sparsity, kurtosis, unit_histogram
from netdeconv.inspect.whiteness import correlation, mean_abs_offdiagonal, pair_correlations
from netdeconv.nn import ChannelWhitening, Whitening
from netdeconv.nn.layer import WhitenedLayer
from netdeconv.surgery.batches import evaluating, run_batch
from netdeconv.surgery.layers import whitened_twin

__all__ = ["LayerView", "Responses", "inspect_layers"]

# Most features of a patch that are looked at, and most in all groups; where there are more, channels are drawn.
_FEATURES, _FEATURES_OF_GROUPS = 1152, 4608

_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclasses.dataclass(frozen=True)
class Responses:
    """Statistics of a layer's input patches, before or after whitening; means over the features.

    Attributes:
        correlation: mean absolute correlation of two features of a patch, within a convolution group; 0 where there
            is one feature only. Of independent features it is about ``0.8 / sqrt(rows)``.
        kurtosis, hoyer: see :func:`kurtosis` and :func:`hoyer_sparsity`; NaN where no feature varies.
        histogram: see :func:`unit_histogram`.
        pixelwise, channelwise: the same of two taps of one channel, and of two channels at one tap.
        matrix: correlation matrix of the features of the first group, or of some whole channels where they are many.
    """

    correlation: float
    pixelwise: float
    channelwise: float
    kurtosis: float
    hoyer: float
    histogram: Tensor
    matrix: Tensor


@dataclasses.dataclass(frozen=True)
class LayerView:
    """One layer, on a batch of data, in evaluation mode.

    Attributes:
        name: path in the model.
        kind: class of the layer.
        features: numbers in a patch, of one convolution group: channels times taps.
        taps: positions of the kernel.
        rows: number of patches.
        raw, standardised, whitened: the patches as they are; with zero mean and unit variance; and centred, scaled and
            whitened with the running statistics, ``None`` for a layer that does not whiten.
        condition: condition number of ``cov + eps I``, the largest of the blocks; of the scaled channels where the
            layer scales them, or would if converted.
        root_residual: ``|D (cov + eps I) D - I|_F / sqrt(n)`` of the running root D against that covariance of
            these data, root mean square over the blocks; 0 is white. ``None`` for a layer that does not whiten.
        refresh_age: training steps since the last refresh; ``None`` likewise.
        updates: number of refreshes; ``None`` likewise.
    """

    name: str
    kind: str
    features: int
    taps: int
    rows: int
    raw: Responses
    standardised: Responses
    whitened: Responses | None
    condition: float
    root_residual: float | None
    refresh_age: int | None
    updates: int | None


@torch.no_grad()
def inspect_layers(model: nn.Module, images: Any, *, max_samples: int = 4096) -> list[LayerView]:
    """Statistics of the input of every convolution and linear layer, for one batch in evaluation mode.

    The model is not changed. Of a layer that is called several times, the first call counts. Layers without
    whitening are cut into the blocks that :func:`netdeconv.convert` would give them by default.

    Args:
        model: whitened or not.
        images: a batch: a tensor, or what :func:`netdeconv.calibrate` takes as one.
        max_samples: most patches in one layer.

    Returns:
        The layers in the order of their first call.

    Raises:
        ConfigError: no such layer, or none was reached.
    """
    layers = {module: name for name, module in model.named_modules() if _is_layer(module)}
    if not layers:
        raise ConfigError("inspect_layers: expected a model with convolutions or linear layers, got one without.")
    views: dict[str, LayerView] = {}

    def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = layers[layer]
        if name not in views:
            x = args[0] if args else next(iter(kwargs.values()))
            views[name] = _view(name, layer, x.detach(), max_samples)

    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        with evaluating(model):
            run_batch(model, images)
    finally:
        for handle in handles:
            handle.remove()
    if not views:
        raise ConfigError("inspect_layers: expected data that reach a convolution or linear layer, got none there.")
    return list(views.values())


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (*_PLAIN, ChannelWhitening)) and not isinstance(module, nn.modules.lazy.LazyModuleMixin)


def _view(name: str, layer: nn.Module, x: Tensor, max_samples: int) -> LayerView:
    whitens = isinstance(layer, (WhitenedLayer, ChannelWhitening))
    whitening: Any = layer.whitening if whitens else _whitening_for(layer, name)
    maps = exact(_as_maps(x, layer, whitening))
    sample = spread_patches(maps, whitening.window, max_samples=max_samples)
    blocks, weights = whitening.blocks, sample.weights
    rows = sample.rows
    scaled = rows * blocks.of_channels(_scale(maps, whitening)).flatten()
    moments = patch_moments(scaled, blocks, weights)
    covs = [_with_eps(_stacked(cov), whitening.config.eps) for cov in moments.covs]
    grouped = rows.reshape(len(rows), blocks.groups, blocks.group_features)
    taps = blocks.taps
    raw = _responses(grouped, weights, taps)
    # Nothing but the sparsity of Hoyer knows of means, and of scales not even that.
    standardised = dataclasses.replace(raw, hoyer=_hoyer(grouped - _mean(grouped, weights), weights, taps))
    white = _responses(_whitened(grouped, whitening), weights, taps) if whitens else None
    return LayerView(
        name=name,
        kind=type(layer).__name__,
        features=blocks.group_features,
        taps=taps,
        rows=len(rows),
        raw=raw,
        standardised=standardised,
        whitened=white,
        condition=max(_condition(cov) for cov in covs),
        root_residual=_residual(covs, whitening) if whitens else None,
        refresh_age=int(whitening.num_steps - whitening.last_update) if whitens else None,
        updates=int(whitening.num_updates) if whitens else None,
    )


def _whitening_for(layer: nn.Module, name: str) -> Whitening:
    twin: Any = whitened_twin(layer, None, name, False)
    return twin.whitening


def _as_maps(x: Tensor, layer: nn.Module, whitening: Whitening) -> Tensor:
    """The input as whitening takes it: ``(N, C)`` for a linear layer, ``(N, C, *spatial)`` for others."""
    dims = len(whitening.window.kernel_size)
    if isinstance(layer, ChannelWhitening):
        return x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    if not dims:
        return x.reshape(-1, x.shape[-1])
    return x if x.dim() == dims + 2 else x.unsqueeze(0)


def _scale(maps: Tensor, whitening: Whitening) -> Tensor:
    """What every channel is multiplied by before the root: as remembered, or as whitening this input would."""
    if whitening.running_var is None:
        return torch.ones(whitening.blocks.channels, dtype=torch.float64, device=maps.device)
    known = int(whitening.num_updates) > 0
    var = exact(whitening.running_var) if known else channel_variance(maps)[1]
    return whitening.estimator.scale_of(var)


def _whitened(grouped: Tensor, whitening: Whitening) -> Tensor:
    """``(x - mean) D``, block by block. Shapes: ``(rows, groups, features of a group)`` -> the same."""
    blocks = whitening.blocks
    found = whitening.remembered()
    grouped = grouped - blocks.spread_mean(exact(found.mean))
    if found.scale is not None:
        grouped = grouped * blocks.of_channels(exact(found.scale))
    parts = [
        torch.einsum("rgbn,gnm->rgbm", part, _stacked(exact(root)).expand(blocks.groups, -1, -1))
        for part, root in zip(blocks.split(grouped), found.roots, strict=True)
    ]
    return blocks.join(parts)


def _stacked(matrix: Tensor) -> Tensor:
    """``(groups, n, n)``, also of one group."""
    return matrix if matrix.dim() == 3 else matrix.unsqueeze(0)


def _condition(cov: Tensor) -> float:
    values = torch.linalg.eigvalsh(cov)
    return float((values[..., -1] / values[..., 0].clamp(min=torch.finfo(values.dtype).tiny)).max())


def _with_eps(cov: Tensor, eps: float) -> Tensor:
    return cov + eps * torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)


def _residual(covs: list[Tensor], whitening: Whitening) -> float:
    total, count = 0.0, 0
    for cov, root in zip(covs, whitening.remembered().roots, strict=True):
        d = _stacked(exact(root))
        total += float(_with_eps(d @ cov @ d, -1.0).square().sum())
        count += cov.shape[0] * cov.shape[-1]
    return (total / count) ** 0.5


def _responses(grouped: Tensor, weights: Tensor | None, taps: int) -> Responses:
    """Numbers of ``(rows, groups, features)``."""
    grouped = _some(grouped, taps)
    flat, count = grouped.flatten(1), grouped.shape[1]
    matrices = [correlation(_covariance(grouped[:, group], weights)) for group in range(count)]
    kinds = [pair_correlations(matrix, taps) for matrix in matrices]
    return Responses(
        correlation=sum(map(mean_abs_offdiagonal, matrices)) / count,
        pixelwise=sum(pixelwise for pixelwise, _ in kinds) / count,
        channelwise=sum(channelwise for _, channelwise in kinds) / count,
        kurtosis=float(kurtosis(flat, weights).nanmean()),
        hoyer=float(hoyer_sparsity(flat, weights).nanmean()),
        histogram=unit_histogram(flat, weights),
        matrix=matrices[0].float(),
    )


def _hoyer(grouped: Tensor, weights: Tensor | None, taps: int) -> float:
    return float(hoyer_sparsity(_some(grouped, taps).flatten(1), weights).nanmean())


def _some(grouped: Tensor, taps: int) -> Tensor:
    """Of ``(rows, groups, channels * taps)`` so many channels that they can be looked at; the same ones every time."""
    groups, features = grouped.shape[1:]
    if features > _FEATURES:
        channels = torch.randperm(features // taps, generator=torch.Generator().manual_seed(0), device="cpu")
        chosen = channels[: max(1, _FEATURES // taps)].sort().values
        grouped = grouped.unflatten(2, (-1, taps))[:, :, chosen].flatten(2)
        features = grouped.shape[2]
    most = max(1, _FEATURES_OF_GROUPS // features)
    if groups <= most:
        return grouped
    return grouped[:, torch.linspace(0, groups - 1, most, device=grouped.device).round().long()]


def _covariance(x: Tensor, weights: Tensor | None) -> Tensor:
    away = x - _mean(x, weights)
    weighted = away if weights is None else away * (weights.to(x.dtype) * (len(x) / weights.sum())).unsqueeze(1)
    return away.mT @ weighted / len(x)


def _mean(x: Tensor, weights: Tensor | None) -> Tensor:
    """Over the first dimension."""
    return x.mean(0) if weights is None else torch.einsum("r,r...->...", weights.to(x.dtype) / weights.sum(), x)
