"""Running batches of a user's data through a user's model, in which mode, and comparing what comes out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from netdeconv.errors import ConfigError
from netdeconv.functional.precision import exact
from netdeconv.surgery.layers import holds_modules, is_layer
from netdeconv.surgery.norms import is_like_batch_norm

__all__ = [
    "Caller",
    "batches",
    "evaluating",
    "fork_rng",
    "listening",
    "max_relative_error",
    "run_batch",
    "tensors_of",
    "training_branches",
]


Caller: TypeAlias = "Callable[[nn.Module, Any], Any] | None"


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


def run_batch(model: nn.Module, batch: Any, call: Caller = None) -> Any:
    """What a model returns for a batch, which is moved to its device first.

    A tensor is passed as it is, of a list or tuple the first entry, a mapping by keyword; else ``call`` says how.
    """
    own = next((tensor for tensor in (*model.parameters(), *model.buffers())), None)
    batch = tree_map_only(Tensor, lambda leaf: leaf if own is None else leaf.to(own.device), batch)
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
    for leaf in tree_leaves(output):
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
    if [a.shape for a in ours] != [b.shape for b in theirs]:
        return float("inf")
    return max((_relative_error(a.detach(), b.detach()) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def _relative_error(a: Tensor, b: Tensor) -> float:
    if not (b.is_floating_point() or b.is_complex()):
        return 0.0 if torch.equal(a, b) else float("inf")
    a, b = exact(a), exact(b)
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite):
        return float("inf")
    if not finite.any():
        return 0.0
    difference, largest = float((a - b)[finite].abs().max()), float(b[finite].abs().max())
    return difference / largest if largest > 0 else difference


@contextlib.contextmanager
def listening(modules: Iterable[nn.Module], hook: Callable[..., Any], **options: Any) -> Iterator[None]:
    """A forward pre-hook on each of the modules, inside."""
    handles = [module.register_forward_pre_hook(hook, **options) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module has its own training flag again, new children their parent's."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for parent in model.modules():  # parents first; not by train(), which may be overridden to do more
            parent.training = flags.get(parent, parent.training)
            for child in parent.children():
                child.training = flags.get(child, parent.training)


@contextlib.contextmanager
def training_branches(model: nn.Module) -> Iterator[None]:
    """Let a model in evaluation mode take the branches of its training, such as auxiliary heads.

    Only modules around others are set to training mode, as it is they who choose a branch. The modules that compute go
    on as in evaluation: layers, normalisations, dropout, torch's attention. So do the functions ``batch_norm``, on
    statistics of a module's own, and ``dropout``.
    What buffers held before, they hold afterwards.
    """
    held = [
        (module._buffers, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not is_lazy(buffer)
    ]
    around = [
        module
        for module in model.modules()
        if holds_modules(module) and not (module.training or _computes(module))
    ]
    for module in around:
        module.training = True
    try:
        with _FunctionsEvaluate():
            yield
    finally:
        for module in around:
            module.training = False
        for buffers, name, buffer, value in held:
            with contextlib.suppress(RuntimeError):  # what cannot be written to, such as an expanded tensor
                buffer.copy_(value)
            buffers[name] = buffer


def _computes(module: nn.Module) -> bool:
    """Whether this module, though it may hold others, is itself what behaves otherwise in training."""
    return is_layer(module) or is_like_batch_norm(module) or isinstance(module, nn.MultiheadAttention)


class _FunctionsEvaluate(TorchFunctionMode):
    """Functions with a flag ``training`` of their own are called with it off, where evaluation is defined."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, place = dict(kwargs or {}), _PLACES.get(func)
        own = func is not F.batch_norm or (args[1] if len(args) > 1 else kwargs.get("running_mean")) is not None
        if place is not None and own and len(args) > place:
            args = (*args[:place], False, *args[place + 1 :])
        elif place is not None and own:
            kwargs["training"] = False
        return func(*args, **kwargs)


# Where the flag is among the arguments.
_PLACES: dict[Any, int] = {F.batch_norm: 5} | dict.fromkeys(
    (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout), 2
)


@contextlib.contextmanager
def fork_rng() -> Iterator[None]:
    """The same random numbers on every use, and the global generators untouched."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield
