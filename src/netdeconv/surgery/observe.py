"""Running a user's data through a model that is to be converted, and what is learnt of its layers meanwhile."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from netdeconv.nn import Whitening
from netdeconv.surgery.batches import batches, run_batch
from netdeconv.surgery.dataflow import Watch
from netdeconv.surgery.modes import fork_rng, training_branches
from netdeconv.surgery.reads import WeightReads
from netdeconv.surgery.statistics import Gatherer, input_rows

__all__ = ["observe"]

_COMPARED = 8  # batches that are kept with their outputs


def observe(
    model: nn.Module,
    whitenings: Mapping[nn.Module, Whitening],
    watch: Watch,
    reads: WeightReads,
    data: Any,
    call: Callable[[nn.Module, Any], Any] | None = None,
) -> tuple[dict[nn.Module, Gatherer], list[tuple[Any, Any]]]:
    """Run the data in evaluation mode; the statistics of every layer's input, and the first batches with what came out.

    Layers that were not reached are looked for in the branches that only training takes, with the batches kept. A
    forward that does not run so, as it wants labels there, is no error: these layers then have no statistics.

    Args:
        model: in evaluation mode.
        whitenings: for every layer the whitening that the statistics are for.
        watch, reads: see the layers at work too.
        data, call: as in :func:`netdeconv.convert`.
    """
    gatherers = _gatherers(whitenings)
    seen: list[tuple[Any, Any]] = []
    with reads, _gathering(gatherers):
        for batch in batches(data):
            output = _run(model, batch, call, watch)
            if len(seen) < _COMPARED:
                seen.append((batch, output))
    missed = _gatherers({layer: whitenings[layer] for layer in gatherers if not gatherers[layer].total})
    if missed:
        with training_branches(model), contextlib.suppress(Exception), reads, _gathering(missed):
            for batch, _ in seen:
                _run(model, batch, call, watch)
            gatherers |= missed
    return gatherers, seen


def _gatherers(whitenings: Mapping[nn.Module, Whitening]) -> dict[nn.Module, Gatherer]:
    return {layer: Gatherer(whitening, every_position=False) for layer, whitening in whitenings.items()}


def _run(model: nn.Module, batch: Any, call: Callable[[nn.Module, Any], Any] | None, watch: Watch) -> Any:
    with fork_rng():
        return watch.run(functools.partial(run_batch, model, batch, call))


@contextlib.contextmanager
def _gathering(gatherers: Mapping[nn.Module, Gatherer]) -> Iterator[None]:
    """Every call of a layer adds its input to the statistics."""

    def gather(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        with torch._C.DisableTorchFunction():  # whoever watches the model is not to watch this
            gatherers[layer].add(input_rows(x, gatherers[layer].whitening.window))

    handles = [layer.register_forward_pre_hook(gather, with_kwargs=True) for layer in gatherers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
