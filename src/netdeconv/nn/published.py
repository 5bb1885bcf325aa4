"""Loading what the authors' layers saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor, nn

from netdeconv.errors import ConfigError
from netdeconv.nn.layer import WhitenedLayer
from netdeconv.nn.whitening import Whitening

__all__ = ["load_published"]

Model = TypeVar("Model", bound=nn.Module)
_SUPPORTED = "supported are the authors' FastDeconv and Delinear"


def load_published(
    model: Model, state_dict: Mapping[str, Tensor], *, rename: Callable[[str], str] | None = None
) -> Model:
    """Load a state dict of the authors' networks into a converted model of the same layers; returns the model.

    Their layers save ``weight``, ``bias``, ``running_mean`` and ``running_deconv``, which become ``weight``,
    ``bias``, ``whitening.running_mean`` and ``whitening.running_root``. In evaluation mode the model then computes
    what theirs did. A prefix ``module.`` on all keys, as ``DataParallel`` saves them, is dropped.

    Args:
        model: whitened with ``WhiteningConfig.paper(block_size=..., eps=..., num_iters=...)``, as theirs was. In
            linear layers :func:`netdeconv.convert` makes the blocks 512 features, their usual number; for another one
            give it a function of path and layer.
        state_dict: theirs.
        rename: from their name of a key to the one it would have in this model, where the modules are called
            otherwise.

    Raises:
        ConfigError: settings or shapes do not fit, or keys are missing or left over. The model is unchanged then.
    """
    theirs = _without_prefix(state_dict)
    theirs = {key if rename is None else rename(key): value for key, value in theirs.items()}
    found: list[tuple[Whitening, Tensor, Tensor]] = []
    problems: list[str] = []
    for path, layer in model.named_modules():
        if isinstance(layer, WhitenedLayer):
            prefix = f"{path}." if path else ""
            mean, root = theirs.pop(f"{prefix}running_mean", None), theirs.pop(f"{prefix}running_deconv", None)
            problem = _why_not(layer.whitening, mean, root)
            if problem is not None:
                problems.append(f"{layer.whitening.label}: {problem}")
            elif mean is not None and root is not None:
                found.append((layer.whitening, mean, root))
    own = {key: value for key, value in model.state_dict().items() if ".whitening." not in f".{key}"}
    problems += [f"{key} is missing" for key in own if key not in theirs]
    problems += [f"{key} has no place in the model; {_SUPPORTED}" for key in theirs if key not in own]
    problems += [
        f"{key}: expected shape {tuple(own[key].shape)}, got {tuple(value.shape)}"
        for key, value in theirs.items()
        if key in own and own[key].shape != value.shape
    ]
    if problems:
        more = f" (and {len(problems) - 6} more)" if len(problems) > 6 else ""
        raise ConfigError(f"load_published: {'; '.join(problems[:6])}{more}.")
    model.load_state_dict(theirs, strict=False)
    for whitening, mean, root in found:
        whitening.set_statistics(mean, [root])
    return model


def _why_not(whitening: Whitening, mean: Tensor | None, root: Tensor | None) -> str | None:
    """What keeps these statistics from being this whitening's."""
    if mean is None or root is None:
        return "running_mean or running_deconv is missing"
    if whitening.config.grouping != "interleaved":
        return "expected the published grouping; convert with whitening=WhiteningConfig.paper()"
    for name, ours, value in (
        ("running_mean", whitening.running_mean, mean),
        ("running_deconv", whitening.running_root, root),
    ):
        if ours.shape != value.shape:
            return f"expected {name} of shape {tuple(ours.shape)}, got {tuple(value.shape)}; is block_size the same?"
    return None


def _without_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = "module."
    drop = bool(state_dict) and all(key.startswith(prefix) for key in state_dict)
    return {key[len(prefix) :] if drop else key: value for key, value in state_dict.items()}
