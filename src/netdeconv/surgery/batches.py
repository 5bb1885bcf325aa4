"""Running batches of a user's data through a user's model, and comparing what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from netdeconv.errors import ConfigError
from netdeconv.functional.precision import exact

__all__ = ["batches", "max_relative_error", "run_batch", "tensors_of"]


def batches(data: Any) -> Iterator[Any]:
    """The batches of a tensor (one batch), or of an iterable of batches.

    Raises:
        ConfigError: nothing to iterate over, or empty.
    """
    if isinstance(data, (Tensor, Mapping)):
        yield data
        return
    if isinstance(data, nn.Module) or not hasattr(data, "__iter__"):
        raise ConfigError(f"data: expected a tensor or an iterable of batches, got {type(data).__name__}.")
    count = 0
    for batch in data:
        count += 1
        yield batch
    if count == 0:
        raise ConfigError("data: expected at least one batch, got none. A used up generator gives none: pass a list.")


def run_batch(model: nn.Module, batch: Any, call: Callable[[nn.Module, Any], Any] | None = None) -> Any:
    """What a model returns for a batch, which is moved to its device first.

    A tensor is passed as it is, of a list or tuple the first entry, a mapping by keyword; else ``call`` says how.
    """
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
    batch = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) and device is not None else leaf, batch)
    if call is not None:
        return call(model, batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (list, tuple)):
        if not batch:
            raise ConfigError("data: expected batches with at least one entry, got an empty one.")
        batch = batch[0]
    return model(batch)


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors in what a model returned: inside lists, mappings, and objects with attributes."""
    found: list[Tensor] = []
    for leaf in tree_flatten(output)[0]:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):
            found += tensors_of(list(leaf.values()))
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (nn.Module, type)):
            found += [value for value in vars(leaf).values() if isinstance(value, Tensor)]
    return found


def max_relative_error(got: Any, expected: Any) -> float:
    """Largest difference of any two numbers, relative to the largest number of the tensor they are in.

    Infinite where tensors differ in number or shape, or where one has NaN or infinite values and the other not.
    """
    ours, theirs = tensors_of(got), tensors_of(expected)
    if len(ours) != len(theirs) or any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True)):
        return float("inf")
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if b.numel() == 0:
            continue
        if not (b.is_floating_point() or b.is_complex()):
            worst = max(worst, 0.0 if torch.equal(a, b) else float("inf"))
            continue
        a, b = exact(a.detach()), exact(b.detach())
        finite = b.isfinite()
        if not torch.equal(a.isfinite(), finite):
            return float("inf")
        if finite.any():
            difference = (a - b)[finite].abs().max()
            largest = b[finite].abs().max()
            worst = max(worst, float(difference / largest) if largest > 0 else float(difference))
    return worst
