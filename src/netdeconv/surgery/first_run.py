"""The first forward of a converted model, which completes and corrects what the module tree alone could not tell."""

from __future__ import annotations

import dataclasses
import sys
import threading
import warnings
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from netdeconv.nn import Whitening
from netdeconv.nn.layer import WhitenedLayer
from netdeconv.surgery.layers import become, holds_modules, is_whitened, plain_again
from netdeconv.surgery.norms import Clone, is_like_batch_norm
from netdeconv.surgery.operations import frames
from netdeconv.surgery.plan import Entry, shown
from netdeconv.surgery.record import Record
from netdeconv.surgery.watch import Watcher

__all__ = ["FirstRun", "InDoubt"]


@dataclasses.dataclass(frozen=True)
class InDoubt:
    """A batch norm that the first forward decides about.

    Attributes:
        place: the module that is the batch norm, or was.
        entry: its line in the plan.
        norm: the batch norm that the module tree let go, with the very parameters; ``None`` for one that waits.
    """

    place: nn.Module
    entry: Entry
    norm: nn.Module | None = None

    @property
    def spot(self) -> nn.Module:
        """What normalises, or stands for it, in the place, which may hold an activation too."""
        found = (module for module in self.place.modules() if isinstance(module, nn.Identity))
        return self.place if self.norm is None else next(found, self.place)

    @property
    def is_open(self) -> bool:
        """Whether nobody has decided yet."""
        return is_like_batch_norm(self.place) == (self.norm is None)

    def remove(self) -> None:
        """Let the batch norm go."""
        assert self.entry.build is not None
        become(self.place, self.entry.build(self.place))

    def restore(self, layer: nn.Module) -> None:
        """Make the place the batch norm again, on the device of a layer and no less precise than it."""
        assert self.norm is not None
        for tensor in (*self.norm.parameters(), *self.norm.buffers()):
            like: torch.Tensor = next(layer.parameters(), tensor)
            real = tensor.is_floating_point()
            dtype = torch.promote_types(like.dtype, tensor.dtype) if real else tensor.dtype
            tensor.data = tensor.data.to(like.device, dtype)
        become(self.place, self.norm)


@dataclasses.dataclass(frozen=True)
class _Running:
    """An outermost call of the model, or of a part of it, in one thread."""

    top: nn.Module
    call: FrameType
    handled: BaseException | None  # being handled when the call began
    watcher: Watcher | None


class FirstRun:
    """Watches a converted model once, and then changes what the run has shown to be wrong, or what had waited for it.

    That is when the model, or the part of it that is called on its own, first runs outside ``torch.compile``, in
    whatever mode, in one thread. Others may run it at the same time: nothing is changed before all have left, and who
    comes meanwhile waits for the change. Then nothing of this is left on the part that ran. A call under torch.func, or
    with other parameters than its own, shows and changes nothing.

    - A layer whose weight something else reads, or whose calls go to several batch norms, is the plain one again, with
      the same parameters. So is the batch norm that had gone for its sake.
    - A batch norm that waited goes where whitening takes its place, and stays otherwise.
    - Where a batch norm was, no clone is made any more if nothing wrote to it in place, and no caller of a part can.

    Args:
        norms: batch norms that wait, or that the tree let go.
        included: modules that the user has named.
        in_place: activations that may work in place again if in the end no batch norm goes.

    Warns:
        UserWarning: what was changed.
    """

    def __init__(self, norms: Iterable[InDoubt], included: Iterable[nn.Module], in_place: Iterable[Any]) -> None:
        self.norms, self.included, self.in_place = list(norms), set(included), list(in_place)
        self.gone = False  # whether a batch norm went for good
        self.plain: set[nn.Module] = set()  # layers that are plain again
        self._start_anew()

    def _start_anew(self) -> None:
        self._lock = threading.RLock()
        self._inside: dict[int, _Running] = {}  # by thread
        self._seen: list[tuple[nn.Module, Record]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy or a pickle: whatever runs at the moment does so on the original."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start_anew()

    def install(self, model: nn.Module) -> None:
        """Watch every module of the model that has modules inside, whichever is called first."""
        model.register_load_state_dict_pre_hook(self.loading)
        for module in model.modules():
            if holds_modules(module) and not is_whitened(module):
                module.register_forward_pre_hook(self.before, prepend=True)
                module.register_forward_hook(self.after, always_call=True)

    @classmethod
    def remove(cls, model: nn.Module) -> None:
        """Take the hooks off a model and everything inside."""
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks, module._load_state_dict_pre_hooks):
                for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)

    def before(self, module: nn.Module, args: Any) -> None:
        """Hook: the outermost call begins in this thread, or one inside it."""
        traced = torch.compiler.is_compiling() or is_fx_symbolic_tracing() or torch.jit.is_tracing()
        if traced or getattr(module, "_is_replica", False):
            return
        thread = threading.get_ident()
        with self._lock:
            for other, running in list(self._inside.items()):
                if _has_ended(running.call):  # by Ctrl-C, which runs no hook
                    self._leave(other)
            finished = not any(map(_is_ours, module._forward_pre_hooks.values()))  # by another thread, just now
            if thread in self._inside or finished:
                return
            watcher = None
            watched = any(running.watcher is not None for running in self._inside.values())
            if not (watched or self._seen or _is_transformed(module)):
                watcher = Watcher(module, [one.spot for one in self.norms if one.norm is not None]).__enter__()
            self._inside[thread] = _Running(module, _call_of_hook(), sys.exc_info()[1], watcher)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hook: a call ends, or an exception has ended it."""
        if torch.compiler.is_compiling():
            return
        thread = threading.get_ident()
        with self._lock:
            running = self._inside.get(thread)
            if running is None or running.top is not module or running.call is not _call_of_hook():
                return
            if running.watcher is not None and sys.exc_info()[1] is running.handled:
                running.watcher.returned(output)
                self._seen.append((module, running.watcher.record))
            self._leave(thread)
            if not self._inside and not _is_transformed(module):
                while self._seen and not _is_transformed(self._seen[-1][0]):
                    self._settle(*self._seen.pop())

    def _leave(self, thread: int) -> None:
        running = self._inside.pop(thread)
        if running.watcher is not None:
            running.watcher.close()

    def loading(self, model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Hook: a state dict of a converted model, which has run, shows what its first forward changed."""
        if not any(".whitening." in f".{key}" for key in state_dict):
            return
        with self._lock:
            known = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
            norms = {one.place: one for one in self.norms}
            needed = _state_without(model, {one.place for one in self.norms if one.norm is None})
            for path, module in list(model.named_modules()):
                start = f"{path}." if path else ""
                held = {key.removeprefix(start) for key in known if key.startswith(start)}
                whitens = any(key.startswith("whitening.") for key in held)
                one = norms.get(module)
                if isinstance(module, WhitenedLayer) and "weight" in held and not whitens:
                    become(module, plain_again(module))
                    self.plain.add(module)
                elif one is not None and one.norm is not None:
                    own = set(one.norm.state_dict())
                    if own <= held and not own <= set(module.state_dict()):
                        one.restore(model)
                elif one is not None and not held and any(True for _ in (*module.parameters(), *module.buffers())):
                    around = next(filter(None, (_below(needed, parent) for parent in _parents(path))), None)
                    if around is not None and around <= known:  # all but this is there
                        one.remove()
                        self.gone = True
            self.norms = [one for one in self.norms if one.is_open]

    def _settle(self, top: nn.Module, record: Record) -> None:
        """Change the part that ran, by what was seen."""
        inside, said = set(top.modules()), []
        names = {module: path for path, module in top.named_modules()}
        shared, spots = record.shared(), {one.spot for one in self.norms}

        def name(layer: nn.Module) -> str:
            return names.get(layer, "") or "the model"

        for layer in (module for module in top.modules() if isinstance(module, WhitenedLayer)):
            several = not spots.isdisjoint(shared.get(layer, ()))
            if (layer in record.weights or several) and layer not in self.included:
                why = f"its weight is read at {record.weights[layer]}" if layer in record.weights else _SEVERAL
                said.append(f"{layer.whitening.label} is plain again ({why})")
                become(layer, plain_again(layer))
                self.plain.add(layer)
        for one in self.norms:
            why_kept = record.why_kept(one.spot, is_whitened, name)
            if one.norm is not None:
                around = self.plain & (record.makers(one.spot) | record.readers.get(one.spot, set()))
                if around and why_kept is not None and one.place not in self.included:
                    one.restore(min(around, key=name))
                    said.append(f"{one.entry.path} is back ({why_kept[0]})")
                else:
                    self.gone |= one.place in inside
            elif one.place in inside and one.place in record.sources:
                if why_kept is None:
                    one.remove()
                    self.gone = True
                said.append(f"{one.entry.path} " + ("is gone" if why_kept is None else f"stays ({why_kept[0]})"))
        whole = any(map(_is_ours, top._load_state_dict_pre_hooks.values()))
        kept = record.written if whole else record.written | record.returned  # whoever calls a part may write to that
        for module in top.modules():
            if type(module) is Clone and module in record.sources and module not in kept:
                become(module, nn.Identity())
        self.norms = [one for one in self.norms if one.is_open and one.place not in inside]
        if not (self.gone or self.norms):
            for module in self.in_place:
                module.inplace = True
        self.remove(top)
        if said:
            warnings.warn(
                f"convert: the first forward has shown what the module tree did not: {shown(said, '; ')}. Convert "
                "with example=, a batch, to know before; include= and exclude= decide otherwise.",
                UserWarning,
                stacklevel=6,  # the caller of the model
            )


_SEVERAL = "it feeds several batch norms, each with statistics of its own"


def _is_ours(hook: Any) -> bool:
    return isinstance(getattr(getattr(hook, "hook", hook), "__self__", None), FirstRun)  # torch wraps those of states


def _is_transformed(module: nn.Module) -> bool:
    """Whether torch.func transforms the call, or other tensors are in place of the module's parameters."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or any(frame.f_globals.get("__name__") == "torch.nn.utils.stateless" for frame in frames())
        or not all(isinstance(parameter, nn.Parameter) for parameter in module.parameters())
    )


def _call_of_hook() -> FrameType:
    """The frame of torch that calls the module whose hook asks: an inner function's, or the hook's caller itself."""
    _, *above = frames()
    return next((frame for frame in above if frame.f_code is nn.Module._call_impl.__code__), above[0])


def _has_ended(frame: FrameType) -> bool:
    """Whether a function has returned, in whatever thread: Python clears no frame that runs."""
    try:
        frame.clear()
    except RuntimeError:
        return False
    return True


def _state_without(model: nn.Module, norms: set[nn.Module]) -> set[str]:
    """Keys of a state dict of the model without these batch norms, and without whitening."""
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if module not in norms and not isinstance(module, Whitening)
        for name, tensor in {**module._parameters, **module._buffers}.items()
        if tensor is not None and name not in module._non_persistent_buffers_set
    }


def _parents(path: str) -> list[str]:
    """``"a.b.c"`` -> ``["a.b.", "a.", ""]``, as keys of what is inside begin."""
    parts = path.split(".")[:-1]
    return [*(".".join(parts[:i]) + "." for i in range(len(parts), 0, -1)), ""]


def _below(keys: set[str], start: str) -> set[str]:
    return {key for key in keys if key.startswith(start)}
