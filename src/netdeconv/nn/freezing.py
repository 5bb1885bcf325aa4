"""Stopping and resuming the statistics of a whole model."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from netdeconv.nn.whitening import Whitening

__all__ = ["freeze", "unfreeze"]

Model = TypeVar("Model", bound=nn.Module)


def freeze(model: Model) -> Model:
    """Stop updating the whitening statistics in a model, also in training mode; returns the model.

    Weights are still trained. For fine-tuning on few samples, or with batches too small for statistics. Like
    ``requires_grad``, the state is copied and pickled with the model, but not in its state dict.
    """
    return _set(model, True)


def unfreeze(model: Model) -> Model:
    """Resume updating the whitening statistics in a model; returns the model."""
    return _set(model, False)


def _set(model: Model, frozen: bool) -> Model:
    for module in model.modules():
        if isinstance(module, Whitening):
            module.frozen = frozen
            module.tell_mode()
    return model
