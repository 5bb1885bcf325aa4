"""Evaluation mode for a while, branches that run in training only, and random numbers that leave no trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from netdeconv.surgery.recognise import is_layer, is_like_batch_norm
from netdeconv.surgery.usage import normalises_by_function

__all__ = ["evaluating", "fork_rng", "training_branches"]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module has its own training flag again, new children their parent's."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags.items():  # not by train(), which may be overridden to do more
            module.training = flag
        for parent in model.modules():
            for child in parent.children():
                if child not in flags:
                    child.training = parent.training


@contextlib.contextmanager
def training_branches(model: nn.Module) -> Iterator[None]:
    """Let a model in evaluation mode take the branches of its training, such as auxiliary heads.

    Only modules around others are told that they are in training, as it is they who choose a branch. The modules that
    compute go on as in evaluation: layers, normalisations, dropout, torch's attention, and those that call the function
    ``batch_norm`` on statistics of their own. One that calls the function ``dropout`` with its own flag drops.
    What buffers held before, they hold afterwards.
    """
    held = [
        (module._buffers, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not is_lazy(buffer)
    ]
    told = [
        module
        for module in model.modules()
        if any(True for _ in module.children()) and not (module.training or _computes(module))
    ]
    for module in told:
        module.training = True
    try:
        yield
    finally:
        for module in told:
            module.training = False
        for buffers, name, buffer, value in held:
            _write_back(buffer, value)
            buffers[name] = buffer


def _computes(module: nn.Module) -> bool:
    """Whether this module, though it may hold others, is itself what behaves otherwise in training."""
    if is_layer(module) or is_like_batch_norm(module) or isinstance(module, nn.MultiheadAttention):
        return True
    return normalises_by_function(module) is not None


def _write_back(buffer: Tensor, value: Tensor) -> None:
    """Copy where something changed; writes through ``.data`` do not count as a version, so values are compared."""
    with contextlib.suppress(RuntimeError):  # no comparison for this kind of tensor: copy
        if torch.equal(buffer, value):
            return
    with contextlib.suppress(RuntimeError):  # what cannot be written to, such as an expanded tensor
        buffer.copy_(value)


@contextlib.contextmanager
def fork_rng() -> Iterator[None]:
    """The same random numbers on every use, and the global generators untouched."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        yield
