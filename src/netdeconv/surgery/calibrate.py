"""Recomputing the running statistics of a whitened network from data."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from netdeconv.errors import ConfigError, NumericalError, StatisticsError, StatisticsWarning
from netdeconv.nn import ChannelWhitening, Whitening
from netdeconv.nn.gathering import Gatherer
from netdeconv.nn.layer import WhitenedLayer
from netdeconv.surgery.batches import Caller, batches, evaluating, listening, run_batch, training_branches
from netdeconv.surgery.plan import shown

__all__ = ["calibrate"]

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def calibrate(
    model: Model, data: Any, *, passes: int = 1, call: Caller = None
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
    layers = [module for module in model.modules() if isinstance(module, (WhitenedLayer, ChannelWhitening))]
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
                _one_pass(model, [layer.whitening for layer in layers], data, call, own=turn == 0)
    except BaseException:
        model.load_state_dict(before, strict=False)
        raise
    return model


def _one_pass(model: nn.Module, whitenings: list[Whitening], data: Any, call: Caller, own: bool) -> None:
    missed = _settle(_gather(model, whitenings, data, call, own))
    if missed and not isinstance(data, Iterator):  # calling iter() would start the workers of a data loader
        gatherers: list[Gatherer] = []
        with training_branches(model):  # which restores all buffers
            try:
                gatherers = _gather(model, missed, data, call, own)
            except NumericalError:
                raise
            except Exception:  # whatever a forward wants in training, such as labels
                pass
        missed = _settle(gatherers) if gatherers else missed
    if missed:
        raise StatisticsError(
            "calibrate: expected data that reach every whitening, got none at "
            f"{shown([whitening.label for whitening in missed])}. If the model never runs these layers, exclude= them "
            "when converting."
        )


def _settle(gatherers: list[Gatherer]) -> list[Whitening]:
    """Give each whitening its statistics; returns those that the data do not reach."""
    for gatherer in gatherers:
        if gatherer.total:
            gatherer.settle()
    return [gatherer.whitening for gatherer in gatherers if not gatherer.total]


def _gather(model: nn.Module, whitenings: list[Whitening], data: Any, call: Caller, own: bool) -> list[Gatherer]:
    """The statistics of what these see; with ``own`` each whitens a batch by the batch's own meanwhile."""
    gatherers = {whitening: Gatherer(whitening, every_position=True) for whitening in whitenings}

    def gather(whitening: Whitening, args: tuple[Any, ...]) -> None:
        gatherer = gatherers[whitening]
        moments = gatherer.add(*args)
        if own and moments is not None:
            if len(args[0]) == 1 or not moments.varies:  # by its own mean, one image is pooled to a constant
                moments = gatherer.moments()
            if moments.varies:
                gatherer.settle(moments)

    # A layer's forward calls its whitening, also where the forward is called as a function; a compiled one does not.
    with listening(gatherers, gather), torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore", StatisticsWarning)  # they are about to be there
        for batch in batches(data):
            run_batch(model, batch, call)
    return list(gatherers.values())
