"""Running a model under a watcher: who feeds and who reads every batch norm, and who reads which weight."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from netdeconv.nn import Whitening
from netdeconv.surgery import operations
from netdeconv.surgery.batches import tensors_of
from netdeconv.surgery.layers import holds_modules, is_layer, is_whitened
from netdeconv.surgery.norms import Clone, is_like_batch_norm
from netdeconv.surgery.record import Call, Record, Source

__all__ = ["Watcher"]


class _Trace(NamedTuple):
    """Where a value comes from.

    Attributes:
        made: the calls of layers that it was last multiplied in; several where they were added or joined.
        norms: batch norms that it has gone through since.
        aliases: batch norms whose output lies in the same memory.
        pooled: it is one number per channel and image, from a pooling.
        given: the call whose very output it is.
    """

    made: frozenset[Call] = frozenset()
    norms: frozenset[nn.Module] = frozenset()
    aliases: frozenset[nn.Module] = frozenset()
    pooled: bool = False
    given: Call | None = None


class Watcher(TorchFunctionMode):
    """A context in which a model is run, in the thread that entered it; ``record`` holds what was seen.

    Every operation passes by here with its arguments, and hooks say which module is running. Nothing of it is left on
    the model afterwards. Other threads may run the model meanwhile; they are not watched.

    Args:
        model: what is run.
        places: modules to be taken for batch norms, as they were.
    """

    def __init__(self, model: nn.Module, places: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self.record = Record()
        # A whitening belongs to its layer, and takes another way where it is hooked, which rounds differently.
        self._modules = [module for module in model.modules() if not isinstance(module, Whitening)]
        self._places = {module for module in self._modules if is_like_batch_norm(module) or isinstance(module, Clone)}
        self._places.update(places)
        self._shut = {module for module in self._modules if module in self._places or _is_alone(module)}
        owners: dict[int, list[nn.Module]] = {}
        for module in self._modules:
            buffers = module.buffers(recurse=False) if module in self._places else ()
            for tensor in (*module.parameters(recurse=False), *buffers):
                owners.setdefault(id(tensor), []).append(module)
        # Of the parameters of layers and norms, which nobody else is to read.
        self._owners = {key: modules for key, modules in owners.items() if any(map(self._is_asked, modules))}
        self._handles: list[Any] = []
        self._reset()

    def _is_asked(self, module: nn.Module) -> bool:
        return module in self._places or is_layer(module)

    def _reset(self) -> None:
        self._traces: Any = WeakIdKeyDictionary()
        self._running: list[nn.Module] = []
        self._closed = 0  # modules running that are not looked into
        self._thread = 0

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
        self.close()

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
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._reset()

    def returned(self, output: Any) -> None:
        """Take in what the model has returned, which counts as read."""
        tensors = tensors_of(output)
        for tensor in tensors:
            self.record.returned |= self._take(tensor).aliases
        if not tensors:  # where they are nobody knows
            self.record.returned |= self._places

    # ---- modules

    def _elsewhere(self) -> bool:
        return threading.get_ident() != self._thread

    def _start(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._elsewhere():
            return
        if not self._running:
            for tensor in _tensors(args, kwargs):
                self._traces.setdefault(tensor, _Trace())
        self._running.append(module)
        self.record.calls[module] += 1
        self._closed += module in self._shut

    def _input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Hook: a layer or a batch norm begins, after all other hooks have seen its input."""
        if self._elsewhere():
            return
        tensors = _tensors(args, kwargs)
        if module in self._places:
            trace = self._traces.get(tensors[0], _Trace()) if tensors else _Trace()
            given = trace.given
            if given is not None and tensors[0].dim() != _batched_dims(given.layer):
                self._take(tensors[0])  # channels are not where the layer puts them, in dimension 1
                given = None
            self.record.sources.setdefault(module, []).append(Source(trace.made, given))
            return
        traces = [self._take(tensor) for tensor in tensors if tensor in self._traces]
        self._reads(module, traces)
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
        given = _tensors(args, kwargs)
        inputs = [self._traces[tensor] for tensor in given if tensor in self._traces]
        for tensor in _tensors(output):
            if module in self._places:
                first = inputs[0] if inputs else _Trace()
                same = any(leaf is tensor for leaf in given)
                aliases = (first.aliases if same else frozenset()) | {module}
                self._traces[tensor] = _Trace(first.made, first.norms | {module}, aliases, first.pooled)
            elif module in self._shut:
                call = Call(module, self.record.calls[module])
                self._traces[tensor] = _Trace(frozenset({call}), pooled=self.record.rows.get(module, False), given=call)
            elif tensor not in self._traces and inputs and not holds_modules(module):
                # It was computed where nobody can look, as in autograd functions.
                weighs = any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
                self._traces[tensor] = self._made_by(module, inputs) if weighs else _joined(inputs)

    # ---- operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._thread or operations.looks_only(func, args):
            return func(*args, **kwargs)
        tensors = _tensors(args, kwargs)
        for tensor in tensors:
            if id(tensor) in self._owners and operations.reads_numbers(func, args, tensor):
                self._read(self._owners[id(tensor)])
        if self._closed:
            return func(*args, **kwargs)
        if func in (F.batch_norm, torch.batch_norm) and self._running:
            mean = args[1] if len(args) > 1 else kwargs.get("running_mean")
            if id(mean) not in self._owners:
                self.record.by_function.add(self._running[-1])
        name = getattr(func, "__name__", "")
        traced = [(tensor, self._take(tensor)) for tensor in tensors if tensor in self._traces]
        aliased = [(tensor, trace, operations.version_of(tensor)) for tensor, trace in traced if trace.aliases]
        output = func(*args, **kwargs)
        for tensor, trace, version in aliased:
            # A dropout in place does nothing in evaluation, and writes in training.
            says = operations.says_in_place(name, kwargs) and (version is None or tensor is tensors[0])
            if says or operations.version_of(tensor) != version:
                self.record.written |= trace.aliases
        if traced:
            self._pass_on(name, traced, output, others=len(traced) < len(tensors))
        return output

    def _pass_on(self, name: str, traced: list[tuple[Tensor, _Trace]], output: Any, others: bool) -> None:
        """What comes out of an operation has the origins of what went in, or is made by the module that is running."""
        inputs = [trace for _, trace in traced]
        by_weight = self._running and operations.multiplies_by_weight(name, others)
        trace = self._made_by(self._running[-1], inputs) if by_weight else _joined(inputs)
        largest = max((tensor for tensor, _ in traced), key=lambda tensor: tensor.dim())
        places = [(operations.memory_of(tensor), given.aliases) for tensor, given in traced if given.aliases]
        for tensor in _tensors(output):
            memory = operations.memory_of(tensor) if places else None
            same = [norms for place, norms in places if place is not None and place == memory]
            still = trace.pooled and math.prod(tensor.shape[2:]) == 1
            self._traces[tensor] = trace._replace(
                aliases=frozenset().union(*same), pooled=still or operations.is_pooled(name, largest, tensor)
            )

    def _made_by(self, module: nn.Module, inputs: list[_Trace]) -> _Trace:
        """The trace of what a module computes from these, which it has read thereby."""
        self._reads(module, inputs)
        return _Trace(frozenset({Call(module, self.record.calls[module])}))

    def _reads(self, module: nn.Module, inputs: list[_Trace]) -> None:
        for norm in frozenset().union(*(trace.norms for trace in inputs)):
            self.record.readers[norm].add(module)

    def _take(self, tensor: Tensor) -> _Trace:
        """The trace of a value that something else than a batch norm reads."""
        trace: _Trace = self._traces.get(tensor, _Trace())
        if trace.given is not None:
            self.record.taken.add(trace.given.layer)
        return trace

    def _read(self, owners: list[nn.Module]) -> None:
        """A parameter is used: by its owner, or by somebody else?"""
        if any(module in self._running for module in owners) or operations.in_forward_of(owners):
            return
        place = operations.place_of_use()
        for module in filter(self._is_asked, owners):
            self.record.weights.setdefault(module, place)


def _is_alone(module: nn.Module) -> bool:
    """Whether this is a layer whose insides are its own."""
    return is_whitened(module) or (is_layer(module) and not holds_modules(module))


def _joined(traces: Iterable[_Trace]) -> _Trace:
    made, norms, _, pooled, _ = zip(*traces, strict=True)
    return _Trace(frozenset().union(*made), frozenset().union(*norms), pooled=all(pooled))


def _tensors(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _batched_dims(layer: Any) -> int:
    kernel = getattr(layer, "kernel_size", None)
    return 2 if kernel is None else len(kernel) + 2
