"""Checkpoints on disk: reading the state dict in one, and putting it into the network it was saved from."""

from __future__ import annotations

import collections
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from netdeconv import ConfigError

__all__ = ["Loaded", "difference", "load_checkpoint", "read_checkpoint", "read_state_dict"]


class Loaded(NamedTuple):
    """What was taken from a checkpoint: keys that start with ``prefix``; ``left_out`` others belong elsewhere."""

    prefix: str
    left_out: int


def read_checkpoint(path: Path) -> Any:
    """What is in a file of ``torch.save``; only tensors and plain containers are unpickled, never code.

    Raises:
        ConfigError: no such file, or not a file of ``torch.save``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol of files that are something else
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"{path}: expected a checkpoint, there is no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a file of another kind can fail anywhere in the unpickler
        raise ConfigError(f"{path}: {_why_not_loaded(str(error))}") from error
    return content


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The state dict in a file of ``torch.save``: the whole of it, or its entry ``"state_dict"``.

    Raises:
        ConfigError: see :func:`read_checkpoint`; also a file with something else in it.
    """
    content = read_checkpoint(path)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping):
        raise ConfigError(f"{path}: expected a state dict, got {type(state).__name__}. Save model.state_dict()")
    if not state:
        raise ConfigError(f"{path}: expected a state dict, got an empty one")
    strange = [f"{key} ({type(value).__name__})" for key, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise ConfigError(
            f'{path}: expected tensors, as in model.state_dict() or under the key "state_dict", got {_few(strange)}. '
            'Take the state dict out: torch.save(checkpoint["..."], FILE)'
        )
    return {str(key): value for key, value in state.items()}


def load_checkpoint(model: nn.Module, path: Path, *, norm: str, classes: int) -> Loaded:
    """Load a checkpoint's state dict into a model, strictly; a prefix that all of its keys there share is dropped.

    Args:
        model: the network, converted as it was when saved.
        path: see :func:`read_state_dict`.
        norm: how the model was converted, for the message that says what to check.
        classes: outputs of the model, likewise.

    Raises:
        ConfigError: not this network's, or with values that are not finite. The model is unchanged then.
    """
    state = read_state_dict(path)
    own = model.state_dict()
    prefixes = _prefixes(own, state)
    complete = [prefix for prefix, count in prefixes.items() if count == len(own)]
    if len(complete) > 1:
        names = ", ".join(prefix or "(none)" for prefix in complete)
        raise ConfigError(f"{path}: expected one such network, got several, with the prefixes {names}. Save only one")
    prefix = max(prefixes, key=lambda prefix: (prefixes[prefix], -len(prefix)), default="")
    theirs = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    missing, unexpected, misshaped = _differences(own, theirs)
    if found := difference(own, theirs):
        remedy = _remedy(own, theirs, missing + unexpected, misshaped, norm, classes)
        raise ConfigError(f"{path}: is of another network: {found}. {remedy}")
    bad = [key for key, value in theirs.items() if not value.isfinite().all()]
    if bad:
        raise ConfigError(f"{path}: expected finite values, got NaN or infinite ones in {_few(bad)}. The run diverged")
    model.load_state_dict(theirs, strict=True)
    return Loaded(prefix, len(state) - len(theirs))


def difference(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str | None:
    """In words, how another state dict does not fit ours; ``None`` where it does.

    The first key of each kind that does not fit is named, and how many more there are.
    """
    missing, unexpected, misshaped = _differences(own, theirs)
    parts = [
        (misshaped, lambda key: f"{key} has shape {tuple(theirs[key].shape)} instead of {tuple(own[key].shape)}"),
        (missing, lambda key: f"{key} is missing"),
        (unexpected, lambda key: f"{key} is unexpected"),
    ]
    found = [text(keys[0]) + (f" (and {len(keys) - 1} more)" if len(keys) > 1 else "") for keys, text in parts if keys]
    return "; ".join(found) or None


def _differences(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    """Keys that they lack, keys that we lack, and keys of another shape."""
    return (
        [key for key in own if key not in theirs],
        [key for key in theirs if key not in own],
        [key for key in own if key in theirs and own[key].shape != theirs[key].shape],
    )


def _prefixes(own: Iterable[str], theirs: Iterable[str]) -> collections.Counter[str]:
    """How many of our keys are found behind each prefix of theirs."""
    ends: dict[str, list[str]] = {}
    for key in theirs:
        ends.setdefault(key.rpartition(".")[2], []).append(key)
    return collections.Counter(
        other.removesuffix(key)
        for key in own
        for other in ends.get(key.rpartition(".")[2], [])
        if f".{other}".endswith(f".{key}")
    )


def _remedy(
    own: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    odd: list[str],
    misshaped: list[str],
    norm: str,
    classes: int,
) -> str:
    """What to check, guessed from how the keys differ."""
    whitened = any(_of_whitening(key) for key in theirs)
    if any(key.endswith("running_deconv") for key in theirs):
        return "It is of the authors' code: load it in Python with netdeconv.surgery.load_published, then export_onnx"
    if norm == "bn" and whitened:
        return "It was saved from a whitened network: try --norm nd"
    if norm != "bn" and not whitened:
        return "It has no whitening statistics: try --norm bn; after fuse, save the network from before instead"
    other = _norm_of(theirs)
    if other not in (None, _norm_of(own)) and all(map(_of_whitening, odd)):
        return f"Try --norm {other}"
    if not odd:
        heads = {_other_classes(own[key], theirs[key], classes) for key in misshaped}
        if len(heads) == 1 and None not in heads:
            return f"Try --classes {heads.pop()}"
    if all(_of_whitening(key) for key in odd + misshaped):
        shapes = ", block_size or grouping as to the shapes" if misshaped else ""
        return (
            f"It was whitened with other settings than those of --norm {norm}{shapes}: convert and load it in Python, "
            "then netdeconv.surgery.export_onnx"
        )
    return "Check --network (networks of torchvision are torchvision:NAME), --width and --norm"


def _norm_of(state: Iterable[str]) -> str | None:
    """The norm that has such statistics: averaged covariances, or nothing but averaged roots."""
    kinds = {key.rpartition(".")[2] for key in state if _of_whitening(key)}
    if "running_cov" in kinds:
        return "nd"
    return "nd-paper" if "running_root" in kinds and not kinds & {"running_var", "last_root"} else None


def _of_whitening(key: str) -> bool:
    return ".whitening." in f".{key}"


def _other_classes(own: Tensor, other: Tensor, classes: int) -> int | None:
    """Their number of classes, if the two differ in nothing else."""
    same = own.ndim == other.ndim > 0 and own.shape[0] == classes and own.shape[1:] == other.shape[1:]
    return other.shape[0] if same else None


def _why_not_loaded(message: str) -> str:
    found: Any = re.search(r"Unsupported (?:global|class)\W*(?:GLOBAL )?([\w.]+)", message)
    if found:
        return (
            f"expected a state dict, got an object that needs code to load ({found[1]}). "
            "Save model.state_dict() instead"
        )
    return "expected a file of torch.save, got one that is damaged or of another kind"


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
