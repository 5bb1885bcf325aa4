"""Recomputing the running statistics of a whitened network from data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from netdeconv.errors import ConfigError, NumericalError, StatisticsError, StatisticsWarning
from netdeconv.nn import ChannelWhitening, Whitening
from netdeconv.nn.layer import WhitenedLayer
from netdeconv.surgery.batches import batches, evaluating, run_batch, training_branches
from netdeconv.surgery.statistics import Gatherer, remember, varies

__all__ = ["calibrate"]

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def calibrate(
    model: Model, data: Any, *, passes: int = 1, call: Callable[[nn.Module, Any], Any] | None = None
) -> Model:
    """Replace the running statistics by those of the data; returns the model.

    Training leaves averages over the last steps, while the weights moved, and of sampled patches. Here the weights are
    fixed, and every patch that training may sample (``config.sampling``) counts once. In the first pass each layer
    whitens a batch with the batch's own statistics, as in training; in each further pass with those of the pass
    before. After k passes the statistics of the first k layers of a chain are exactly those of their input in
    evaluation.

    Meanwhile the model is in evaluation mode (no dropout); training flags are restored. Layers that the data do not
    reach this way, such as auxiliary heads, are looked for in the branches that only training takes, in another pass.
    Frozen layers are recomputed too.

    Args:
        model: a converted model, trained or not.
        data: a tensor, or an iterable of batches; with ``passes > 1`` one that can be iterated again.
        passes: passes over the data.
        call: how to run a batch, as in :func:`netdeconv.convert`.

    Raises:
        ConfigError: nothing to calibrate, no data, or data that cannot be iterated ``passes`` times.
        StatisticsError: the data never reach some layer.
        NumericalError: statistics that are not finite. In both cases the running statistics are unchanged.
    """
    layers: dict[nn.Module, Whitening] = {
        module: module.whitening for module in model.modules() if isinstance(module, (WhitenedLayer, ChannelWhitening))
    }
    if not layers:
        raise ConfigError("calibrate: expected a model with whitened layers, got one without. Convert it first.")
    if passes < 1:
        raise ConfigError(f"calibrate: expected passes >= 1, got {passes}.")
    if passes > 1 and isinstance(data, Iterator):
        raise ConfigError(f"calibrate: expected data that can be gone through {passes} times, got an iterator.")
    before = {name: value.clone() for name, value in model.state_dict().items() if ".whitening." in f".{name}"}
    try:
        with evaluating(model):
            for turn in range(passes):
                _one_pass(model, layers, data, call, own=turn == 0)
    except BaseException:
        model.load_state_dict(before, strict=False)
        raise
    return model


def _one_pass(model: nn.Module, layers: dict[nn.Module, Whitening], data: Any, call: Any, own: bool) -> None:
    gathered = _gather(model, layers, data, call, own)
    missed = _remember_all(gathered)
    if not missed:
        return
    if not isinstance(data, Iterator):  # calling iter() would start the workers of a data loader
        missed = _reach_in_training(model, missed, data, call, own)
    if missed:
        labels = [whitening.label for whitening in missed.values()]
        shown = ", ".join(labels[:5]) + (f", and {len(labels) - 5} more" if len(labels) > 5 else "")
        raise StatisticsError(
            f"calibrate: expected data that reach every whitening, got none at {shown}. If the model never runs these "
            "layers, exclude= them when converting."
        )


def _reach_in_training(
    model: nn.Module, layers: dict[nn.Module, Whitening], data: Any, call: Any, own: bool
) -> dict[nn.Module, Whitening]:
    """Gather for these layers in the branches of training; returns those that the data do not reach there either."""
    with training_branches(model):
        try:
            gathered = _gather(model, layers, data, call, own)
        except NumericalError:
            raise
        except Exception:  # whatever a forward wants in training, such as labels
            return layers
    return _remember_all(gathered)


def _remember_all(gathered: dict[nn.Module, Gatherer]) -> dict[nn.Module, Whitening]:
    """Make what was gathered the remembered statistics; returns the layers for which there is nothing."""
    for gatherer in gathered.values():
        if gatherer.total:
            remember(gatherer.whitening, gatherer.moments(), gatherer.batches)
    return {layer: gatherer.whitening for layer, gatherer in gathered.items() if not gatherer.total}


def _gather(
    model: nn.Module, layers: dict[nn.Module, Whitening], data: Any, call: Any, own: bool
) -> dict[nn.Module, Gatherer]:
    """The statistics of what these layers see; with ``own`` they whiten a batch by the batch's own meanwhile."""
    gatherers = {layer: Gatherer(whitening, every_position=True) for layer, whitening in layers.items()}

    of_whitening = {gatherer.whitening: gatherer for gatherer in gatherers.values()}

    def gather(whitening: nn.Module, args: tuple[Any, ...]) -> None:
        (x,) = args
        gatherer = of_whitening[whitening]  # type: ignore[index]
        moments = gatherer.add(x)
        if own and moments is not None:
            if len(x) == 1 or not varies(moments):  # by its own mean, one image is pooled to a constant
                moments = gatherer.moments()
            if varies(moments):
                remember(gatherer.whitening, moments, 1)

    # A layer's forward calls its whitening, also where the forward is called as a function; a compiled one does not.
    handles = [whitening.register_forward_pre_hook(gather) for whitening in of_whitening]
    try:
        with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.simplefilter("ignore", StatisticsWarning)  # they are about to be there
            for batch in batches(data):
                run_batch(model, batch, call)
    finally:
        for handle in handles:
            handle.remove()
    return gatherers
