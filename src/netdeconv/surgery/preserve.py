"""Running data through a network that is to be converted, and converting it so that its evaluation output stays."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from netdeconv.errors import NumericalError
from netdeconv.functional import Window, unfold
from netdeconv.functional.precision import exact
from netdeconv.nn import Whitening
from netdeconv.nn.gathering import Gatherer
from netdeconv.surgery.batches import (
    Caller,
    batches,
    evaluating,
    fork_rng,
    listening,
    max_relative_error,
    run_batch,
    training_branches,
)
from netdeconv.surgery.layers import become, is_layer, parameter_like
from netdeconv.surgery.norms import BatchNorm, ChannelAffine, is_like_batch_norm, scale_and_shift
from netdeconv.surgery.plan import Action, ConversionPlan, shown
from netdeconv.surgery.record import Record
from netdeconv.surgery.watch import Watcher

__all__ = ["preserved", "record_of"]

# Largest relative error of the converted network's output that passes for equal, by the weights' precision. Rounding
# is amplified by the condition of the roots, at most 1.5**5 = 8 per layer for 5 steps, some hundred for "eigh".
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_TOLERANCE_HALF = 0.1
_COMPARED = 8  # batches that are kept with their outputs


@torch.no_grad()
def record_of(model: nn.Module, example: Any, call: Caller = None) -> Record:
    """What one batch shows of a model: run in evaluation mode, and where that leaves modules out, in training branches.

    Args:
        example, call: one batch and how it is run, as in :func:`netdeconv.convert`.
    """
    with evaluating(model):
        return observe(model, {}, [example], call)[0]


def observe(
    model: nn.Module, whitenings: Mapping[nn.Module, Whitening], data: Any, call: Caller
) -> tuple[Record, dict[nn.Module, Gatherer], list[tuple[Any, Any]]]:
    """Run the data in evaluation mode; what was seen, every layer's statistics, the first batches and what came out.

    Where that leaves out layers or batch norms, the batches kept are run once more with the branches that only training
    takes. A forward that does not run so, as it wants labels there, is no error: these layers then have no statistics.

    Args:
        model: in evaluation mode.
        whitenings: for every layer the whitening that the statistics are for.
        data, call: as in :func:`netdeconv.convert`.
    """
    watcher = Watcher(model)
    gatherers = {layer: Gatherer(whitening, every_position=False) for layer, whitening in whitenings.items()}
    seen: list[tuple[Any, Any]] = []

    def run(batch: Any) -> Any:
        with fork_rng(), watcher:
            output = run_batch(model, batch, call)
            watcher.returned(output)
        return output

    def gather(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, gatherer = args[0] if args else kwargs["input"], gatherers[layer]
        with torch._C.DisableTorchFunction():  # whoever watches the model is not to watch this
            gatherer.add(_input_rows(x, gatherer.whitening.window))

    with listening(gatherers, gather, with_kwargs=True):
        for batch in batches(data):
            output = run(batch)
            if len(seen) < _COMPARED:
                seen.append((batch, output))
    parts = {module for module in model.modules() if is_layer(module) or is_like_batch_norm(module)}
    if parts <= set(watcher.record.calls):
        return watcher.record, gatherers, seen
    before = copy.deepcopy(watcher.record, {id(module): module for module in model.modules()})  # of the same modules
    missed = {layer: gatherer for layer, gatherer in gatherers.items() if not gatherer.total}
    try:
        with training_branches(model), listening(missed, gather, with_kwargs=True):
            for batch, _ in seen:
                run(batch)
    except Exception:
        nothing = {layer: Gatherer(gatherer.whitening, every_position=False) for layer, gatherer in missed.items()}
        return before, gatherers | nothing, seen
    return watcher.record, gatherers, seen


def _input_rows(x: Tensor, window: Window) -> Tensor:
    """A layer's input as ``(N, C, *spatial)``: with a batch dimension, or for a linear layer as rows."""
    if not window.kernel_size:
        return x.reshape(-1, x.shape[-1])
    return x if x.dim() == len(window.kernel_size) + 2 else x.unsqueeze(0)


@torch.no_grad()
def preserved(
    model: nn.Module,
    draft: ConversionPlan,
    decide: Callable[[Record], ConversionPlan],
    data: Any,
    call: Caller = None,
) -> ConversionPlan:
    """Convert ``model``, in place, so that it evaluates as before; returns what was done in the end.

    Args:
        draft: says which layers may be whitened.
        decide: the plan, from what is seen while the data run.

    Raises:
        NumericalError: it does not, beyond the rounding that the dtype of the weights explains.
    """
    sharing = _with_shared_parameters(model)
    drafted: dict[Any, Any] = {model.get_submodule(entry.path): entry.build for entry in draft.where(Action.WHITEN)}
    twins = {layer: build(layer) for layer, build in drafted.items() if layer not in sharing}
    with evaluating(model):
        record, gatherers, seen = observe(model, {layer: twin.whitening for layer, twin in twins.items()}, data, call)
        plan = decide(record)
        paths = {model.get_submodule(entry.path): entry.path for entry in plan}
        modules: dict[str, Any] = {path: module for module, path in paths.items()}
        plain: dict[Any, str] = {}  # layers that are left after all
        targets: dict[Any, tuple[Tensor, Tensor]] = {}  # weight and bias of the others, were they plain
        for entry in plan.where(Action.WHITEN):
            layer = modules[entry.path]
            if layer in sharing:
                plain[layer] = "it shares parameters with another module"
            elif layer in record.weights:
                plain[layer] = f"its weight is read elsewhere ({record.weights[layer]})"
            elif not gatherers[layer].total:
                plain[layer] = "the data never reach it"
            else:
                targets[layer] = _plain_parameters(layer)
        left, read = plan.where(Action.LEAVE), set(twins) & set(record.weights)  # which are to be warned of, too
        done = {entry.path: (Action.LEAVE, entry.why) for entry in left if modules[entry.path] in read}
        done |= {paths[layer]: (Action.LEAVE, why) for layer, why in plain.items()}
        feeds = {norm: layer for norm, layer in record.feeds().items() if not (_has_hooks(norm) or _has_hooks(layer))}
        for entry in plan.where(Action.REMOVE):
            norm, build = modules[entry.path], entry.build
            assert isinstance(build, BatchNorm)
            before = sorted(paths[layer] for layer in record.makers(norm) if layer in plain)
            layer, affine = feeds.get(norm, norm), scale_and_shift(norm)
            if before:
                done[entry.path] = (Action.LEAVE, f"it normalises the output of {before[0]}, which is left")
            elif affine is None:
                done[entry.path] = (Action.LEAVE, "it has no running statistics, so evaluation depends on the batch")
            elif layer in targets:
                (weight, bias), (scale, shift) = targets[layer], affine
                targets[layer] = weight * scale.reshape(-1, *[1] * (weight.dim() - 1)), bias * scale + shift
                become(norm, build(norm))
                done[entry.path] = (Action.FOLD, f"into {paths[layer]}")
            else:
                become(norm, build.around(_as_affine(norm, *affine), "affine"))
                done[entry.path] = (Action.AFFINE, "no layer feeds it alone")
        for layer, target in targets.items():
            gatherers[layer].settle()
            found, blocks = twins[layer].whitening.remembered(), twins[layer].whitening.blocks
            unfolded = unfold(*target, found.mean, found.roots, blocks, found.scale)
            become(layer, _with_weights(layer, twins[layer], *unfolded))
            done[paths[layer]] = (Action.WHITEN, "evaluates as before")
        _check_outputs(model, seen, call)
    result = plan.changed(done)
    said = [f"{entry.path} ({entry.why})" for entry in result.where(Action.LEAVE) if entry.path in done]
    if said:
        warnings.warn(f"convert: left as they were, to preserve the output: {shown(said)}.", UserWarning, stacklevel=5)
    return result


def _check_outputs(model: nn.Module, seen: list[tuple[Any, Any]], call: Caller) -> None:
    worst = 0.0
    for batch, expected in seen:
        with fork_rng():
            error = max_relative_error(run_batch(model, batch, call), expected)
        worst = max(worst, error)
    dtypes = {parameter.dtype for parameter in model.parameters()}
    tolerance = max((_TOLERANCE.get(dtype, _TOLERANCE_HALF) for dtype in dtypes), default=0.0)
    if not worst <= tolerance:
        raise NumericalError(
            f"convert: expected the converted model's evaluation output within {tolerance:.0e} of the old one's, got a "
            f"relative difference of {worst:.1e}. A forward that is random, or that changes the model, is one "
            "reason; exclude= the layers it concerns. If it is rounding, convert in float32 or raise eps."
        )


def _as_affine(norm: Any, scale: Tensor, shift: Tensor) -> nn.Module:
    like = norm.weight if getattr(norm, "weight", None) is not None else norm.running_mean
    learns = any(parameter.requires_grad for parameter in norm.parameters(recurse=False))
    return ChannelAffine(scale.to(like), shift.to(like)).requires_grad_(learns)


def _with_weights(layer: Any, twin: Any, weight: Tensor, bias: Tensor) -> Any:
    learns = (layer.weight if layer.bias is None else layer.bias).requires_grad
    twin.weight = parameter_like(layer.weight, weight)
    twin.bias = nn.Parameter(bias.to(layer.weight), requires_grad=learns)
    return twin


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
