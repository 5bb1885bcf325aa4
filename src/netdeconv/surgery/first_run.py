"""The first forward of a converted model, which completes and corrects what the module tree alone could not tell."""

from __future__ import annotations

import copy
import sys
import threading
import warnings
from collections.abc import Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from netdeconv.nn import Whitening
from netdeconv.nn.layer import WhitenedLayer
from netdeconv.surgery.frames import call_of, has_ended, in_functional_call
from netdeconv.surgery.layers import become, is_whitened, plain_again
from netdeconv.surgery.norms import Clone, is_like_batch_norm
from netdeconv.surgery.plan import Entry, shown
from netdeconv.surgery.record import Record
from netdeconv.surgery.watch import Watcher

__all__ = ["FirstRun", "Removed"]



class Removed(NamedTuple):
    """A batch norm that the module tree let go.

    Attributes:
        place: the module that was the batch norm.
        norm: the batch norm as it was, with the very parameters.
        entry: its line in the plan.
    """

    place: nn.Module
    norm: nn.Module
    entry: Entry

    @property
    def spot(self) -> nn.Module:
        """What stands for the normalisation in the place, which may hold an activation too."""
        return next((module for module in self.place.modules() if isinstance(module, nn.Identity)), self.place)

    def restore(self, layer: nn.Module) -> None:
        """Make the place the batch norm again, on the device of a layer and no less precise than it."""
        weight = next(layer.parameters(), None)
        for tensor in (*self.norm.parameters(), *self.norm.buffers()):
            if weight is not None and tensor.is_floating_point():
                tensor.data = tensor.data.to(weight.device, torch.promote_types(weight.dtype, tensor.dtype))
            elif weight is not None:
                tensor.data = tensor.data.to(weight.device)
        become(self.place, self.norm)


class _Running(NamedTuple):
    """An outermost call of the model, or of a part of it, in one thread."""

    top: nn.Module
    call: FrameType
    handled: BaseException | None  # being handled when the call began


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

    Warns:
        UserWarning: what was changed.
    """

    def __init__(
        self,
        waiting: list[tuple[nn.Module, Entry]],
        included: list[nn.Module],
        removed: list[Removed],
        in_place: list[Any],
    ) -> None:
        self.waiting, self.included, self.removed, self.in_place = waiting, included, removed, in_place
        self.gone = False  # whether a batch norm went for good
        self.plain: list[nn.Module] = []  # layers that a state dict has made plain again
        self._start_anew()

    def _start_anew(self) -> None:
        self._lock = threading.RLock()
        self._inside: dict[int, _Running] = {}  # by thread
        self._watch: Watcher | None = None
        self._watched: _Running | None = None
        self._seen: list[tuple[nn.Module, Record]] = []

    @classmethod
    def install(
        cls,
        model: nn.Module,
        waiting: list[tuple[nn.Module, Entry]],
        included: list[nn.Module],
        removed: list[Removed],
        in_place: list[Any],
    ) -> None:
        """Watch every module of the model that has modules inside, whichever is called first.

        Args:
            waiting: batch norms that wait, with their lines in the plan.
            included: modules that the user has named.
            removed: batch norms that the tree let go.
            in_place: activations that may work in place again if in the end no batch norm goes.
        """
        watcher = cls(waiting, included, removed, in_place)
        model.register_load_state_dict_pre_hook(watcher.loading)
        for module in model.modules():
            if any(True for _ in module.children()) and not is_whitened(module):
                module.register_forward_pre_hook(watcher.before, prepend=True)
                module.register_forward_hook(watcher.after, always_call=True)

    @classmethod
    def remove(cls, model: nn.Module) -> None:
        """Take the hooks off a model and everything inside."""
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)
            loading: Any = module._load_state_dict_pre_hooks
            for key in [key for key, held in loading.items() if _is_ours(getattr(held, "hook", None))]:
                del loading[key]

    def before(self, module: nn.Module, args: Any) -> None:
        """Hook: the outermost call begins in this thread, or one inside it."""
        if torch.compiler.is_compiling() or _is_traced() or getattr(module, "_is_replica", False):
            return
        thread = threading.get_ident()
        with self._lock:
            self._forget_broken_off()
            if thread in self._inside or not _is_hooked(module):  # another thread may have finished just now
                return
            self._inside[thread] = running = _Running(module, call_of(), sys.exc_info()[1])
            if self._watch is None and not self._seen and not _is_transformed(module):
                spots = [removed.spot for removed in self.removed]
                self._watch, self._watched = Watcher(module, spots), running
                self._watch.__enter__()

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hook: a call ends, or an exception has ended it."""
        if torch.compiler.is_compiling():
            return
        thread = threading.get_ident()
        with self._lock:
            running = self._inside.get(thread)
            if running is None or running.top is not module or running.call is not call_of():
                return
            del self._inside[thread]
            if running is self._watched and self._watch is not None:
                watch, self._watch, self._watched = self._watch, None, None
                if sys.exc_info()[1] is running.handled:
                    watch.returned(output)
                    self._seen.append((module, watch.record))
                watch.close()
            if not self._inside and not _is_transformed(module):
                while self._seen and not _is_transformed(self._seen[-1][0]):
                    self._settle(*self._seen.pop())

    def loading(self, model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Hook: a state dict of a converted model, which has run, shows what its first forward changed."""
        if not any(".whitening." in f".{key}" for key in state_dict):
            return
        with self._lock:
            waiting, removed = dict(self.waiting), {one.place: one for one in self.removed}
            known = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
            for path, module in list(model.named_modules()):
                held = [key[len(prefix) + len(path) + 1 :] for key in state_dict if key.startswith(f"{prefix}{path}.")]
                whitens = any(key.startswith("whitening.") for key in held)
                if isinstance(module, WhitenedLayer) and "weight" in held and not whitens:
                    become(module, plain_again(module))
                    self.plain.append(module)
                elif module in removed and _is_state_of(removed[module], held):
                    removed[module].restore(model)
                elif module in waiting and not held and _is_missing(model, path, waiting, known):
                    become(module, waiting[module].build(module))  # type: ignore[misc]
                    self.gone = True
            self.waiting = [(norm, entry) for norm, entry in self.waiting if is_like_batch_norm(norm)]
            self.removed = [one for one in self.removed if not is_like_batch_norm(one.place)]

    def _forget_broken_off(self) -> None:
        """Ctrl-C runs no hook: forget calls, of any thread, that have ended without."""
        for thread, running in list(self._inside.items()):
            if has_ended(running.call):
                del self._inside[thread]
                if running is self._watched and self._watch is not None:
                    self._watch.close()
                    self._watch = self._watched = None

    def _settle(self, top: nn.Module, record: Record) -> None:
        """Change the part that ran, by what was seen."""
        inside = set(top.modules())
        said: list[str] = []
        shared, waiting = record.shared(), {norm for norm, _ in self.waiting}
        spots = {removed.spot for removed in self.removed}
        plain = set(self.plain)
        for layer in (module for module in top.modules() if isinstance(module, WhitenedLayer)):
            norms = [norm for norm in shared.get(layer, ()) if norm in spots or norm in waiting]
            if (layer in record.weights or norms) and layer not in self.included:
                why = f"its weight is read at {record.weights[layer]}" if layer in record.weights else _SEVERAL
                said.append(f"{layer.whitening.label} is plain again ({why})")
                become(layer, plain_again(layer))
                plain.add(layer)
        names = {module: path for path, module in top.named_modules()}

        def name(layer: nn.Module) -> str:
            return names.get(layer, "") or "the model"

        for removed in self.removed:
            spot = removed.spot
            around = plain & (record.makers(spot) | record.readers.get(spot, set()))
            fate = record.why_kept(spot, is_whitened, name)
            if around and fate is not None and removed.place not in self.included:
                removed.restore(min(around, key=name))
                said.append(f"{removed.entry.path} is back ({fate[0]})")
            else:
                self.gone |= removed.place in inside
        for norm, entry in self.waiting:
            if norm not in inside or norm not in record.sources or entry.build is None:
                continue
            fate = record.why_kept(norm, is_whitened, name)
            if fate is None:
                become(norm, entry.build(norm))
                self.gone = True
                said.append(f"{entry.path} is gone")
            else:
                said.append(f"{entry.path} stays ({fate[0]})")
        for module in top.modules():
            kept = record.written if _is_whole(top) else record.written | record.returned
            if type(module) is Clone and module in record.sources and module not in kept:
                become(module, nn.Identity())
        self.waiting = [(norm, entry) for norm, entry in self.waiting if norm not in inside]
        self.removed = [removed for removed in self.removed if removed.place not in inside]
        if not (self.gone or self.waiting or self.removed):
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

    def __deepcopy__(self, memo: dict[int, Any]) -> FirstRun:
        if id(self) not in memo:
            memo[id(self)] = new = FirstRun([], [], [], [])  # whatever runs at the moment does so on the original
            new.waiting = [(copy.deepcopy(norm, memo), entry) for norm, entry in self.waiting]
            new.included = [copy.deepcopy(module, memo) for module in self.included]
            new.removed = [
                Removed(copy.deepcopy(place, memo), copy.deepcopy(norm, memo), entry)
                for place, norm, entry in self.removed
            ]
            new.plain = [copy.deepcopy(module, memo) for module in self.plain]
            new.in_place = [copy.deepcopy(module, memo) for module in self.in_place]
            new.gone = self.gone
        return memo[id(self)]

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _STATE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start_anew()


_STATE = ("waiting", "included", "removed", "plain", "in_place", "gone")
_SEVERAL = "it feeds several batch norms, each with statistics of its own"


def _is_state_of(removed: Removed, held: list[str]) -> bool:
    """Whether a state dict has, with these names, the state of a batch norm rather than of what is in its place."""
    own = set(removed.norm.state_dict())
    return own <= set(held) and not own <= set(removed.place.state_dict())


def _is_missing(model: nn.Module, path: str, waiting: Mapping[nn.Module, Entry], known: set[str]) -> bool:
    """Whether a state dict, of these keys, is of a model without this batch norm: it has all that is around it."""
    if not _own_state(path, model.get_submodule(path)):
        return False
    while path:
        path = path.rpartition(".")[0]
        around = {
            key
            for inner, module in model.get_submodule(path).named_modules(prefix=path)
            if module not in waiting and not isinstance(module, Whitening)
            for key in _own_state(inner, module)
        }
        if around:
            return around <= known
    return False


def _own_state(path: str, module: nn.Module) -> list[str]:
    """Keys of a state dict that are this module's, without those inside it."""
    buffers = [name for name in module._buffers if name not in module._non_persistent_buffers_set]
    own = {name: getattr(module, name) for name in (*module._parameters, *buffers)}
    return [f"{path}.{name}" if path else name for name, tensor in own.items() if tensor is not None]


def _is_ours(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), FirstRun)


def _is_hooked(module: nn.Module) -> bool:
    return any(map(_is_ours, module._forward_pre_hooks.values()))


def _is_whole(module: nn.Module) -> bool:
    """Whether this is the model that was converted, not a part of it."""
    return any(_is_ours(getattr(held, "hook", None)) for held in module._load_state_dict_pre_hooks.values())


def _is_traced() -> bool:
    """Whether operators are recorded rather than run, by torch.fx or torch.jit."""
    return is_fx_symbolic_tracing() or torch.jit.is_tracing()


def _is_transformed(module: nn.Module) -> bool:
    """Whether torch.func transforms the call, or other tensors are in place of the module's parameters."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or in_functional_call()
        or not all(isinstance(parameter, nn.Parameter) for parameter in module.parameters())
    )
