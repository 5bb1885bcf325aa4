"""Which batch norm reads which layer's output, found by watching batches go through the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from netdeconv.surgery.batches import tensors_of

__all__ = ["Watch", "looks_only"]

# Properties that tell about a tensor without reading its numbers.
_HARMLESS = {
    getattr(Tensor, name)
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout", "is_sparse", "is_quantized")
}
_HARMLESS_METHODS = {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__, Tensor.new_zeros, Tensor.new_ones,
    Tensor.new_empty, Tensor.new_full, Tensor.new_tensor, torch.zeros_like, torch.ones_like, torch.empty_like,
}  # fmt: skip


class Watch(TorchFunctionMode):
    """Runs a model, once or more; afterwards ``feeds`` says which layer a batch norm can go into.

    Every operation passes by here with its arguments. A layer's output may be folded into when the batch norm
    is the only one to look at it, in every call of either.

    Args:
        layers: modules that a batch norm may be folded into.
        norms: the batch norms.
    """

    def __init__(self, layers: Iterable[nn.Module], norms: Iterable[nn.Module]) -> None:
        super().__init__()
        self._layers, self._norms = set(layers), set(norms)
        self._outputs: Any = WeakIdKeyDictionary()  # tensor -> the layer that gave it, while the tensor lives
        self._read_elsewhere: set[nn.Module] = set()
        self._calls: dict[nn.Module, int] = {}
        self._sources: dict[nn.Module, list[nn.Module | None]] = {}
        self._inside = 0
        self._handles: list[Any] = []

    def __enter__(self) -> Watch:
        for layer in self._layers:
            self._handles.append(layer.register_forward_hook(self._after_layer))
        for norm in self._norms:
            self._handles.append(norm.register_forward_pre_hook(self._before_norm))
            self._handles.append(norm.register_forward_hook(self._after_norm, always_call=True))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def run(self, call: Callable[[], Any]) -> Any:
        """Run the model; what it returns counts as read. A run that fails counts as none."""
        before = set(self._read_elsewhere), dict(self._calls), {norm: [*read] for norm, read in self._sources.items()}
        try:
            with self:
                output = call()
        except BaseException:
            self._read_elsewhere, self._calls, self._sources = before
            self._inside = 0
            raise
        for tensor in tensors_of(output):
            self._read(tensor)
        return output

    def sources(self, norm: nn.Module) -> set[nn.Module]:
        """The layers whose output this batch norm read."""
        return {source for source in self._sources.get(norm, ()) if source is not None}

    def feeds(self) -> dict[nn.Module, nn.Module]:
        """For each batch norm the layer it can be folded into, where there is one."""
        readers: dict[nn.Module, set[nn.Module]] = {}
        for norm, sources in self._sources.items():
            for source in sources:
                if source is not None:
                    readers.setdefault(source, set()).add(norm)
        found = {}
        for norm, sources in self._sources.items():
            source = sources[0]
            if source is None or set(sources) != {source} or source in self._read_elsewhere:
                continue
            if len(readers[source]) == 1 and len(sources) == self._calls[source]:
                found[norm] = source
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._inside and self._outputs and not looks_only(func):
            for leaf in tree_leaves((args, kwargs)):
                self._read(leaf)
        return func(*args, **kwargs)

    def _read(self, value: Any) -> None:
        layer = self._outputs.get(value) if isinstance(value, Tensor) else None
        if layer is not None:
            self._read_elsewhere.add(layer)

    def _after_layer(self, layer: nn.Module, args: Any, output: Any) -> None:
        self._calls[layer] = self._calls.get(layer, 0) + 1
        if isinstance(output, Tensor):
            self._outputs[output] = layer

    def _before_norm(self, norm: nn.Module, args: Any) -> None:
        x: Any = args[0] if args else None
        layer = self._outputs.get(x) if isinstance(x, Tensor) else None
        # Channels have to be where the layer puts them: in dimension 1 of a batch.
        if layer is not None and x.dim() != _batched_dims(layer):
            layer = None
        self._sources.setdefault(norm, []).append(layer)
        self._inside += 1

    def _after_norm(self, norm: nn.Module, args: Any, output: Any) -> None:
        self._inside -= 1


def _batched_dims(layer: Any) -> int:
    return 2 if isinstance(layer, nn.Linear) else len(layer.kernel_size) + 2


def looks_only(func: Any) -> bool:
    """Whether an operation asks a tensor for its shape, type or place, and not for its numbers."""
    owner = getattr(func, "__self__", None)
    return func in _HARMLESS_METHODS or (getattr(func, "__name__", "") == "__get__" and owner in _HARMLESS)
