"""Recomputing the remembered statistics of a whitened network from data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from netdeconv.errors import ConfigError, NumericalError, StatisticsError, StatisticsWarning
from netdeconv.nn import ChannelWhitening, Whitening
from netdeconv.nn.gathering import Gatherer
from netdeconv.nn.layer import WhitenedLayer
from netdeconv.surgery.batches import batches, evaluating, run_batch, training_branches
from netdeconv.surgery.plan import shown

__all__ = ["calibrate"]

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def calibrate(
    model: Model, data: Any, *, passes: int = 1, call: Callable[[nn.Module, Any], Any] | None = None
) -> Model:
    """Replace the remembered statistics by those of the data, every patch with the same weight; returns the model.

    In training they are averages over the last steps, of weights that moved meanwhile, and of samples of patches.
    Here weights stand still, and every patch is looked at that training may look at (``config.sampling``). In the
    first pass each layer whitens a batch by the batch's own statistics, as in training; in each further pass by
    those of the pass before. After pass k they are exact for the first k layers of a chain: exactly the statistics
    of what the layer sees in evaluation.

    Everything but the whitenings is in evaluation mode meanwhile (no dropout). Training flags are restored. Layers that
    the data do not reach so are looked for in the branches that only training takes, as auxiliary heads are, by
    going through the data once more.
    Frozen whitenings are recomputed too, as this is an explicit wish.

    Args:
        model: a converted model, trained or not.
        data: a tensor, or an iterable of batches; with ``passes > 1`` one that can be gone through again.
        passes: how often to go through the data.
        call: how a batch is run, as in :func:`netdeconv.convert`.

    Raises:
        ConfigError: nothing to calibrate, no data, or data that cannot be gone through ``passes`` times.
        StatisticsError: the data never reach some whitening.
        NumericalError: statistics that are not finite. In both cases all remembered values stay what they were.
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
        raise StatisticsError(
            f"calibrate: expected data that reach every whitening, got none at {shown(labels)}. If the model never "
            "runs these layers, exclude= them when converting."
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
            gatherer.settle()
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
            if len(x) == 1 or not moments.varies:  # by its own mean, one image is pooled to a constant
                moments = gatherer.moments()
            if moments.varies:
                gatherer.settle(moments)

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
