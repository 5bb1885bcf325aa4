"""Conversion of a trained network that leaves its evaluation output as it was."""

from __future__ import annotations

import collections
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from netdeconv.errors import NumericalError
from netdeconv.functional import Blocks
from netdeconv.functional.precision import exact
from netdeconv.surgery.affine import ChannelAffine, scale_and_shift
from netdeconv.surgery.batches import max_relative_error, run_batch
from netdeconv.surgery.dataflow import Watch
from netdeconv.surgery.layers import Setting, parameter_like, setting_for, whitened_twin
from netdeconv.surgery.modes import evaluating, fork_rng
from netdeconv.surgery.observe import observe
from netdeconv.surgery.plan import Action, ConversionPlan
from netdeconv.surgery.reads import WeightReads
from netdeconv.surgery.recognise import BatchNorm, batch_norm
from netdeconv.surgery.statistics import Gatherer, remember
from netdeconv.surgery.transplant import become

__all__ = ["preserved", "unfold"]

# Largest relative error of the converted network's output that passes for equal, by the weights' precision. Rounding
# is amplified by the condition of the roots, at most 1.5**5 = 8 per layer for 5 steps, some hundred for "eigh".
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_TOLERANCE_HALF = 0.1


@torch.no_grad()
def preserved(
    model: nn.Module,
    plan: ConversionPlan,
    whitening: Setting,
    data: Any,
    call: Callable[[nn.Module, Any], Any] | None = None,
) -> ConversionPlan:
    """Convert ``model``, in place, so that it evaluates as before; returns what was done in the end.

    Raises:
        NumericalError: it does not, beyond the rounding that the dtype of the weights explains.
    """
    modules = {entry.path: model.get_submodule(entry.path) for entry in plan}
    layers = {modules[entry.path]: entry.path for entry in plan.where(Action.WHITEN)}
    norms = {modules[entry.path]: entry.path for entry in plan.where(Action.REMOVE)}
    plain = dict.fromkeys(_with_shared_parameters(model) & set(layers), "it shares parameters with another module")
    twins: dict[nn.Module, Any] = {
        layer: whitened_twin(layer, setting_for(whitening, path, layer), path, True)
        for layer, path in layers.items()
        if layer not in plain
    }
    watch = Watch(
        [layer for layer in layers if not _has_hooks(layer)], [norm for norm in norms if not _has_hooks(norm)]
    )
    reads = WeightReads(model, twins)
    with evaluating(model):
        whitenings = {layer: twin.whitening for layer, twin in twins.items()}
        gatherers, seen = observe(model, whitenings, watch, reads, data, call)
        plain |= {layer: "the data never reach it" for layer in twins if not gatherers[layer].total}
        plain |= {layer: f"its weight is read elsewhere ({place})" for layer, place in reads.found.items()}
        feeds = watch.feeds()
        targets = {layer: _plain_parameters(layer) for layer in twins if layer not in plain}
        done: dict[str, tuple[Action, str]] = {}
        for norm, path in norms.items():
            before = [layers[layer] for layer in watch.sources(norm) if layer in plain]
            done[path] = (
                (Action.LEAVE, f"it normalises the output of {before[0]}, which is left")
                if before
                else _replace_norm(norm, feeds.get(norm), targets, layers)
            )
        for layer, path in layers.items():
            done[path] = (
                (Action.LEAVE, plain[layer])
                if layer in plain
                else _replace_layer(layer, twins[layer], gatherers[layer], targets[layer])
            )
        errors = []
        for batch, expected in seen:
            with fork_rng():
                errors.append(max_relative_error(run_batch(model, batch, call), expected))
    _warn_of_plain(plan, done)
    dtypes = {parameter.dtype for parameter in model.parameters()}
    tolerance = max((_TOLERANCE.get(dtype, _TOLERANCE_HALF) for dtype in dtypes), default=0.0)
    if not max(errors) <= tolerance:
        raise NumericalError(
            f"convert: expected the converted model's evaluation output within {tolerance:.0e} of the old one's, got a "
            f"relative difference of {max(errors):.1e}. A forward that is random, or that changes the model, is one "
            "reason; exclude= the layers it concerns. If it is rounding, convert in float32 or raise eps."
        )
    return plan.changed(done)


def _warn_of_plain(plan: ConversionPlan, done: dict[str, tuple[Action, str]]) -> None:
    """Say which modules were to be converted and are not."""
    left = [
        f"{entry.path} ({done[entry.path][1]})" for entry in plan if done.get(entry.path, (None,))[0] is Action.LEAVE
    ]
    if left:
        shown = ", ".join(left[:5]) + (f", and {len(left) - 5} more" if len(left) > 5 else "")
        warnings.warn(f"convert: left as they were, to preserve the output: {shown}.", UserWarning, stacklevel=6)


def _replace_norm(
    norm: Any, layer: nn.Module | None, targets: dict[nn.Module, Any], paths: dict[nn.Module, str]
) -> tuple[Action, str]:
    """Fold a batch norm into the layer's target, or make it an affine."""
    affine = scale_and_shift(norm)
    if affine is None:
        return Action.LEAVE, "it has no remembered statistics, so evaluation depends on the batch"
    found = batch_norm(norm)
    assert isinstance(found, BatchNorm)
    learns = any(parameter.requires_grad for parameter in norm.parameters(recurse=False))
    scale, shift = affine
    if layer in targets:
        weight, bias = targets[layer]
        targets[layer] = (weight * scale.reshape(-1, *[1] * (weight.dim() - 1)), bias * scale + shift)
        become(norm, found.without(alone=True))
        return Action.FOLD, f"into {paths[layer]}"
    like = norm.weight if getattr(norm, "weight", None) is not None else norm.running_mean
    new: nn.Module = ChannelAffine(scale.to(like), shift.to(like)).requires_grad_(learns)
    if found.after:
        new = nn.Sequential(collections.OrderedDict([("affine", new), *found.after.items()]))
    become(norm, new)
    return Action.AFFINE, "no layer feeds it alone"


def _replace_layer(layer: Any, twin: Any, gatherer: Gatherer, target: Any) -> tuple[Action, str]:
    """Make a layer its twin, with the remembered statistics, and weights that undo them."""
    remember(twin.whitening, gatherer.moments(), gatherer.batches)
    weight, bias = unfold(target[0], target[1], twin.whitening)
    twin.weight = parameter_like(layer.weight, weight)
    twin.bias = nn.Parameter(bias.to(layer.weight), requires_grad=_flag(layer))
    become(layer, twin)
    return Action.WHITEN, "evaluates as before"


def unfold(weight: Tensor, bias: Tensor, whitening: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias that fold to the given ones with a whitening's remembered mean and roots; float64.

    The inverse of :func:`netdeconv.functional.fold`: ``w = D^-1 S^-1 w'``, ``b = b' + mean w'``.
    """
    blocks: Blocks = whitening.blocks
    found = whitening.remembered()
    grouped = exact(weight).reshape(blocks.groups, -1, blocks.group_features)
    shift = torch.einsum("goi,gi->go", grouped, blocks.spread_mean(exact(found.mean))).flatten()
    if found.scale is not None:
        grouped = grouped / blocks.of_channels(exact(found.scale)).unsqueeze(1)
    parts = []
    for part, root in zip(blocks.split(grouped), found.roots, strict=True):
        groups, out, count, size = part.shape
        flat = part.reshape(groups, out * count, size)
        solved = torch.linalg.solve(exact(root).expand(groups, size, size), flat, left=False)
        parts.append(solved.reshape(part.shape))
    return blocks.join(parts).reshape(weight.shape), exact(bias) + shift


def _plain_parameters(layer: Any) -> tuple[Tensor, Tensor]:
    weight = exact(layer.weight.detach())
    return weight, weight.new_zeros(weight.shape[0]) if layer.bias is None else exact(layer.bias.detach())


def _with_shared_parameters(model: nn.Module) -> set[nn.Module]:
    """Modules one of whose own parameters belongs to another module too."""
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(module)
    return {module for sharing in owners.values() if len(sharing) > 1 for module in sharing}


def _has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to this module, who would hear something else after folding."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _flag(layer: Any) -> bool:
    return bool(layer.weight.requires_grad if layer.bias is None else layer.bias.requires_grad)
