"""Running a model under a watcher: who feeds and who reads every batch norm, and who reads which weight."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from netdeconv.nn import Whitening
from netdeconv.surgery.batches import tensors_of
from netdeconv.surgery.frames import in_forward_of, place_of_use
from netdeconv.surgery.operations import (
    asks_for_type,
    is_batch_norm,
    is_pooled,
    looks_only,
    memory_of,
    multiplies_by_weight,
    says_in_place,
    version_of,
)
from netdeconv.surgery.recognise import Clone, is_layer, is_like_batch_norm, is_whitened

__all__ = ["Record", "Watcher"]



class Call(NamedTuple):
    """One call of a layer, by its number."""

    layer: nn.Module
    turn: int


class _Trace(NamedTuple):
    """Where a value comes from.

    Attributes:
        made: the calls of layers that it was last multiplied in; several where they were added or joined.
        norms: batch norms that it has gone through since.
        aliases: batch norms whose output lies in the same memory.
        pooled: it is one number per channel and image, from a pooling.
    """

    made: frozenset[Call] = frozenset()
    norms: frozenset[nn.Module] = frozenset()
    aliases: frozenset[nn.Module] = frozenset()
    pooled: bool = False


_INPUT = _Trace()


class Record:
    """What was seen while a model ran, once or more.

    Attributes:
        calls: how often each layer was called.
        sources: for every batch norm, by call, the calls of layers that made its input; empty where none did.
        outputs: the same, where the input is the very tensor that a layer gave, with the dimensions of a batch.
        readers: for every batch norm the layers that read what it gave.
        taken: layers whose output something else than a batch norm read, or the model returned.
        weights: for every layer or batch norm whose parameters something else read, a place, as ``file.py:12 in f``.
        written: batch norms whose output an operation in place has changed.
        returned: batch norms whose output lies in the memory of what the model returned, or may.
        rows: for every layer, whether in all calls it saw one number per channel and image, from a pooling.
        by_function: modules that call torch's function ``batch_norm`` on statistics of their own.
    """

    def __init__(self) -> None:
        self.calls: dict[nn.Module, int] = {}
        self.sources: dict[nn.Module, list[frozenset[Call]]] = {}
        self.outputs: dict[nn.Module, list[Call | None]] = {}
        self.readers: dict[nn.Module, set[nn.Module]] = {}
        self.taken: set[nn.Module] = set()
        self.weights: dict[nn.Module, str] = {}
        self.written: set[nn.Module] = set()
        self.returned: set[nn.Module] = set()
        self.rows: dict[nn.Module, bool] = {}
        self.by_function: set[nn.Module] = set()

    def copy(self) -> Record:
        new = Record()
        for name, value in vars(self).items():
            setattr(new, name, value.copy())
        nested: tuple[dict[nn.Module, Any], ...] = (new.sources, new.outputs, new.readers)
        for found in nested:
            found.update({key: value.copy() for key, value in found.items()})
        return new

    def makers(self, norm: nn.Module) -> frozenset[nn.Module]:
        """The layers that made what a batch norm normalises."""
        return frozenset(call.layer for calls in self.sources.get(norm, ()) for call in calls)

    def joined(self, norm: nn.Module) -> bool:
        """Whether in some call a batch norm normalises a sum, or a concatenation, of what several layers made."""
        return any(len(calls) > 1 for calls in self.sources.get(norm, ()))

    def feeds(self) -> dict[nn.Module, nn.Module]:
        """For a batch norm the layer it can be folded into: no other reads any output of that layer, nor it others."""
        readers: dict[nn.Module, set[nn.Module]] = {}
        for norm, calls in self.outputs.items():
            for call in calls:
                if call is not None:
                    readers.setdefault(call.layer, set()).add(norm)
        found = {}
        for norm, calls in self.outputs.items():
            layers = {None if call is None else call.layer for call in calls}
            layer = layers.pop()
            if layers or layer is None or layer in self.taken or len(readers[layer]) > 1:
                continue
            if len(calls) == self.calls[layer]:
                found[norm] = layer
        return found

    def shared(self) -> dict[nn.Module, list[nn.Module]]:
        """Layers of which some calls go to one batch norm, and some to another, with these batch norms."""
        turns: dict[nn.Module, dict[nn.Module, set[int]]] = {}
        for norm, calls in self.sources.items():
            for call in (call for made in calls if len(made) == 1 for call in made):
                turns.setdefault(call.layer, {}).setdefault(norm, set()).add(call.turn)
        return {
            layer: list(norms)
            for layer, norms in turns.items()
            if any(one.isdisjoint(other) for one in norms.values() for other in norms.values())
        }


class Watcher(TorchFunctionMode):
    """A context in which a model is run, in the thread that entered it; ``record`` holds what was seen.

    Every operation passes by here with its arguments, and hooks say which module is running. Nothing of it is left on
    the model afterwards. Other threads may run the model meanwhile; they are not watched.
    """

    def __init__(self, model: nn.Module, places: Iterable[nn.Module] = ()) -> None:
        """``places`` are modules to be taken for batch norms, as they were."""
        super().__init__()
        self.record = Record()
        # A whitening belongs to its layer, and takes another way where it is hooked, which rounds differently.
        self._modules = [module for module in model.modules() if not isinstance(module, Whitening)]
        self._places = {module for module in self._modules if is_like_batch_norm(module) or isinstance(module, Clone)}
        self._places.update(places)
        self._shut = {module for module in self._modules if module in self._places or _is_alone(module)}
        self._owners: dict[int, list[nn.Module]] = {}
        self._asked: dict[int, list[nn.Module]] = {}  # layers and norms whose parameters nobody else is to read
        for module in self._modules:
            kept = module in self._places
            for tensor in (*module.parameters(recurse=False), *(module.buffers(recurse=False) if kept else ())):
                self._owners.setdefault(id(tensor), []).append(module)
                if kept or is_layer(module):
                    self._asked.setdefault(id(tensor), []).append(module)
        self._reset()
        self._handles: list[Any] = []
        self._thread = 0

    def _reset(self) -> None:
        self._traces: Any = WeakIdKeyDictionary()
        self._given: Any = WeakIdKeyDictionary()  # tensor -> the call that gave it, while the tensor lives
        self._running: list[nn.Module] = []
        self._closed = 0  # modules running that are not looked into

    # ---- the context

    def __enter__(self) -> Watcher:
        self._thread = threading.get_ident()
        for module in self._modules:
            self._handles.append(module.register_forward_pre_hook(self._start, prepend=True, with_kwargs=True))
            if module in self._shut:
                self._handles.append(module.register_forward_pre_hook(self._input, with_kwargs=True))
            self._handles.append(
                module.register_forward_hook(self._stop, prepend=True, with_kwargs=True, always_call=True)
            )
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._remove_hooks()

    def close(self) -> None:
        """Leave the context, also from where it is not the innermost one; from another thread it only ends its work."""
        if not self._elsewhere():
            inner = []
            while self in _get_current_function_mode_stack():
                mode = _pop_mode()
                if mode is not self:
                    inner.append(mode)
            for mode in reversed(inner):
                _push_mode(mode)
        self._thread = 0
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._reset()

    def run(self, call: Callable[[], Any]) -> Any:
        """Run the model; what it returns counts as read. A run that fails counts as none."""
        before = self.record.copy()
        try:
            with self:
                output = call()
                self.returned(output)
        except BaseException:
            self.record = before
            raise
        return output

    def returned(self, output: Any) -> None:
        """Take in what the model has returned."""
        tensors = tensors_of(output)
        for tensor in tensors:
            self._take(tensor)
            if tensor in self._traces:
                self.record.returned |= self._traces[tensor].aliases
        if not tensors:  # where they are nobody knows
            self.record.returned |= self._places

    # ---- modules

    def _elsewhere(self) -> bool:
        return threading.get_ident() != self._thread

    def _start(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._elsewhere():
            return
        if not self._running:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and leaf not in self._traces:
                    self._traces[leaf] = _INPUT
        self._running.append(module)
        self.record.calls[module] = self.record.calls.get(module, 0) + 1
        self._closed += module in self._shut

    def _input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Hook: a layer or a batch norm begins, after all other hooks have seen its input."""
        if self._elsewhere():
            return
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        traces = [self._traces[tensor] for tensor in tensors if tensor in self._traces]
        if module in self._places:
            first = tensors[0] if tensors else None
            trace = self._traces.get(first, _INPUT) if first is not None else _INPUT
            self.record.sources.setdefault(module, []).append(trace.made)
            call = self._given.get(first) if first is not None else None
            if call is not None and first is not None and first.dim() != _batched_dims(call.layer):
                self._take(first)  # channels are not where the layer puts them, in dimension 1
                call = None
            self.record.outputs.setdefault(module, []).append(call)
            return
        for tensor in tensors:
            self._take(tensor)
        for norm in frozenset().union(*(trace.norms for trace in traces)):
            self.record.readers.setdefault(norm, set()).add(module)
        rows = bool(traces) and all(trace.pooled for trace in traces)
        self.record.rows[module] = self.record.rows.get(module, True) and rows

    def _stop(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._elsewhere() or module not in self._running:
            return
        while self._running.pop() is not module:  # those of a call that was broken off
            pass
        self._closed = sum(other in self._shut for other in self._running)
        if self._closed:
            return
        inputs = [self._traces[leaf] for leaf in tree_leaves((args, kwargs)) if _has(self._traces, leaf)]
        for tensor in (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)):
            if module in self._places:
                first = inputs[0] if inputs else _INPUT
                same = any(leaf is tensor for leaf in tree_leaves((args, kwargs)))
                aliases = (first.aliases if same else frozenset()) | {module}
                self._traces[tensor] = first._replace(norms=first.norms | {module}, aliases=aliases)
            elif module in self._shut:
                call = Call(module, self.record.calls[module])
                self._traces[tensor] = _Trace(frozenset({call}), pooled=self.record.rows.get(module, False))
                self._given[tensor] = call
            elif tensor not in self._traces and inputs and not any(True for _ in module.children()):
                # It was computed where nobody can look, as in autograd functions.
                weighs = any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
                self._traces[tensor] = self._made_by(module, inputs) if weighs else _joined(inputs)

    # ---- operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._thread or looks_only(func, args):
            return func(*args, **kwargs)
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for leaf in leaves:
            if id(leaf) in self._asked and not asks_for_type(func, args, leaf):
                self._read(id(leaf))
        if self._closed:
            return func(*args, **kwargs)
        for leaf in leaves:
            self._take(leaf)
        name = getattr(func, "__name__", "")
        if is_batch_norm(func):
            self._normalised(args, kwargs)
        traced = [(leaf, self._traces[leaf]) for leaf in leaves if leaf in self._traces]
        aliased = [(leaf, trace.aliases, version_of(leaf)) for leaf, trace in traced if trace.aliases]
        output = func(*args, **kwargs)
        for leaf, norms, version in aliased:
            # A dropout in place does nothing in evaluation, and writes in training.
            says = says_in_place(name, kwargs) and (version is None or leaf is leaves[0])
            if says or version_of(leaf) != version:
                self.record.written |= norms
        if traced:
            by_weight = multiplies_by_weight(name, several=len(traced) < len(leaves))
            self._pass_on(name, by_weight, traced, output)
        return output

    def _pass_on(self, name: str, by_weight: bool, traced: list[tuple[Tensor, _Trace]], output: Any) -> None:
        """What comes out of an operation has the origins of what went in, or is made by the module that is running."""
        inputs = [trace for _, trace in traced]
        trace = self._made_by(self._running[-1], inputs) if by_weight and self._running else _joined(inputs)
        largest = max((leaf for leaf, _ in traced), key=lambda leaf: leaf.dim())
        places = [(memory_of(leaf), given.aliases) for leaf, given in traced if given.aliases]
        for tensor in (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)):
            memory = memory_of(tensor) if places else None
            same = [norms for place, norms in places if place is not None and place == memory]
            self._traces[tensor] = trace._replace(
                aliases=frozenset().union(*same),
                pooled=is_pooled(name, largest, tensor) or (trace.pooled and math.prod(tensor.shape[2:]) == 1),
            )

    def _made_by(self, module: nn.Module, inputs: list[_Trace]) -> _Trace:
        """The trace of what a module computes from these, which it has read thereby."""
        for norm in frozenset().union(*(trace.norms for trace in inputs)):
            self.record.readers.setdefault(norm, set()).add(module)
        return _Trace(frozenset({Call(module, self.record.calls[module])}))

    def _take(self, tensor: Tensor) -> None:
        call = self._given.get(tensor)
        if call is not None:
            self.record.taken.add(call.layer)

    def _read(self, key: int) -> None:
        """A parameter is used: by its owner, or by somebody else?"""
        owners = self._owners[key]
        if any(module in self._running for module in owners) or in_forward_of(owners):
            return
        place = place_of_use()
        for module in self._asked[key]:
            self.record.weights.setdefault(module, place)

    def _normalised(self, args: Any, kwargs: Any) -> None:
        """``batch_norm`` is called by function: on whose statistics?"""
        mean = args[1] if len(args) > 1 else kwargs.get("running_mean")
        if self._running and id(mean) not in self._asked:
            self.record.by_function.add(self._running[-1])


def _is_alone(module: nn.Module) -> bool:
    """Whether this is a layer whose insides are its own."""
    return is_whitened(module) or (is_layer(module) and not any(True for _ in module.children()))


def _joined(traces: Iterable[_Trace]) -> _Trace:
    traces = list(traces)
    return _Trace(
        frozenset().union(*(trace.made for trace in traces)),
        frozenset().union(*(trace.norms for trace in traces)),
        pooled=all(trace.pooled for trace in traces),
    )


def _has(traces: Any, leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf in traces


def _batched_dims(layer: Any) -> int:
    kernel = getattr(layer, "kernel_size", None)
    return 2 if kernel is None else len(kernel) + 2
