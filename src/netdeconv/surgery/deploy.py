"""From a trained whitened network to one that is served: plain layers, and an ONNX file that is tried."""

from __future__ import annotations

import importlib
import itertools
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from netdeconv.errors import ConfigError, NumericalError
from netdeconv.functional import fold
from netdeconv.nn import ChannelWhitening
from netdeconv.nn.layer import WhitenedLayer
from netdeconv.surgery.batches import Caller, max_relative_error, run_batch, tensors_of
from netdeconv.surgery.first_run import FirstRun
from netdeconv.surgery.layers import become, copied, plain_twin

__all__ = ["OPSET", "ChannelLinear", "check_fused", "export_onnx", "fuse"]

Model = TypeVar("Model", bound=nn.Module)

OPSET = 20
_TOLERANCE = 1e-4  # float32 in another runtime, which sums in another order


class ChannelLinear(nn.Module):
    """A linear layer over the channels at every position: what a :class:`netdeconv.ChannelWhitening` is fused to.

    Shapes: ``(N, C, *)`` -> ``(N, C', *)``.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear(x.movedim(1, -1)).movedim(-1, 1)
        return output


@torch.no_grad()
def fuse(model: Model) -> Model:
    """A copy of a model for evaluation, of plain ``nn.ConvNd`` and ``nn.Linear``, with the same output.

    Running statistics are folded into the weights. The copy needs nothing of this package, and cannot be trained on as
    a whitened network: keep the old one for that. Memory format, device, dtype, ``requires_grad`` and hooks are kept.

    Raises:
        ConfigError: the model, or a whitened layer in it, is in training mode; a layer with a forward of its own, or
            with a weight that is computed by a hook, as pruning does; a model that cannot be copied.

    Example:
        >>> import torch, netdeconv
        >>> from netdeconv.zoo import create
        >>> model = netdeconv.convert(create("resnet18", width=0.25))
        >>> _ = model(torch.randn(4, 3, 32, 32))  # training gathers the statistics
        >>> fused = netdeconv.fuse(model.eval())
        >>> type(fused.conv1).__name__
        'Conv2d'
    """
    whitened = [module for module in model.modules() if isinstance(module, (WhitenedLayer, ChannelWhitening))]
    for module, name in ((model, "the model"), *((layer, layer.whitening.label) for layer in whitened)):
        if module.training:
            raise ConfigError(
                f"fuse: expected a model in evaluation mode, got {name} in training mode, where it whitens by the "
                "statistics of the batch and no plain layer equals it. Call model.eval() first."
            )
    for layer, name in itertools.product(whitened, ("weight", "bias")):
        kept = hasattr(layer, "parametrizations") or name in layer._parameters
        if isinstance(layer, WhitenedLayer) and not kept:  # a hook that computes it on every call undoes the folding
            raise ConfigError(
                f"fuse: expected whitened layers whose {name} is a parameter, got {layer.whitening.label} with one "
                "that a hook computes (pruning, old style weight_norm). Make it permanent first, for pruning by "
                f"torch.nn.utils.prune.remove(layer, {name!r}), or prune the fused model instead."
            )
    new = copied(model, "fuse")
    FirstRun.remove(new)
    parts: list[nn.Module] = list(new.modules())
    for part in parts:
        if isinstance(part, WhitenedLayer):
            become(part, plain_twin(part))
        elif isinstance(part, ChannelWhitening):
            become(part, _channel_twin(part))
    return new


def _channel_twin(layer: ChannelWhitening) -> ChannelLinear:
    channels, found = layer.num_channels, layer.whitening.remembered()
    eye = torch.eye(channels, dtype=found.mean.dtype, device=found.mean.device)
    linear = nn.Linear(channels, channels, device="meta")
    folded = fold(eye, None, found.mean, found.roots, layer.whitening.blocks, found.scale)
    linear.weight, linear.bias = (nn.Parameter(value.clone(), requires_grad=False) for value in folded)
    return ChannelLinear(linear)


def check_fused(
    model: nn.Module,
    fused: nn.Module,
    inputs: Any,
    *,
    tolerance: float = 1e-4,
    call: Caller = None,
) -> float:
    """Compare a fused model with the one it came from; returns the largest relative error.

    ``max |fused(x) - model(x)| / max |model(x)|`` over the batch ``inputs``, for every tensor of the output.

    Raises:
        ConfigError: one of the two is in training mode.
        NumericalError: the error is larger than ``tolerance``.
    """
    for name, module in (("model", model), ("fused", fused)):
        if any(part.training for part in module.modules()):
            raise ConfigError(
                f"check_fused: expected {name} in evaluation mode, got training mode. Call .eval() first."
            )
    with torch.no_grad():
        error = max_relative_error(run_batch(fused, inputs, call), run_batch(model, inputs, call))
    if not error <= tolerance:
        raise NumericalError(
            f"check_fused: expected a relative error of at most {tolerance:.0e}, got {error:.1e}. In half precision "
            "rounding explains up to some percent; otherwise the two are not the same network."
        )
    return error


def export_onnx(
    model: nn.Module,
    example: Tensor | Sequence[Tensor],
    path: str | os.PathLike[str],
    *,
    fused: bool = True,
    opset: int = OPSET,
    dynamic_batch: bool = True,
    check: bool = True,
) -> Path:
    """Write a model in evaluation mode to an ONNX file; returns the path.

    Fused first, so that the file holds the ordinary Conv and Gemm nodes of the plain network. The file is then
    run in onnxruntime on the example, and on a batch of another size, and compared with the model.

    Args:
        model: a whitened model, or a plain one.
        example: input, or inputs, of the size to export for.
        path: where to write; weights go into the same file.
        fused: ``False`` keeps the folding as part of the graph: larger, slower, for comparison.
        opset: version of the ONNX operators.
        dynamic_batch: let the first dimension of every input vary together.
        check: run the file and compare.

    Raises:
        ConfigError: the model is in training mode, the exporter cannot write this opset, or the packages of
            ``netdeconv[export]`` are not installed.
        NumericalError: the file computes something else than the model.
    """
    for name in ("onnx", "onnxscript", *(["onnxruntime"] if check else [])):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"export_onnx: expected the package {name} to be installed, got {error}. "
                "pip install 'netdeconv[export]'."
            ) from error
    plain = fuse(model) if fused else model
    if any(module.training for module in plain.modules()):
        raise ConfigError(
            "export_onnx: expected a model in evaluation mode, got training mode. Call model.eval() first."
        )
    inputs = [example] if isinstance(example, Tensor) else list(example)
    if dynamic_batch:  # a size of one would be taken for a constant
        inputs = [x if x.shape[0] > 1 else torch.cat([x, x]) for x in inputs]
    names = [f"input{index}" if len(inputs) > 1 else "input" for index in range(len(inputs))]
    batch, path = torch.export.Dim("batch", min=1), Path(path)
    with torch.no_grad(), warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):  # of the exporter about its own internals
            warnings.simplefilter("ignore", category)
        program: Any = torch.onnx.export(
            plain,
            tuple(inputs),
            input_names=names,
            opset_version=opset,
            dynamo=True,
            dynamic_shapes=tuple({0: batch} for _ in inputs) if dynamic_batch else None,
            verbose=False,
        )
        written = program.model.opset_imports[""]  # another version, without an error, where it cannot write this one
        if written != opset:
            raise ConfigError(
                f"export_onnx: expected an opset that the exporter can write, got opset={opset}, for which it wrote "
                f"{written}. Pass opset={written}, or leave it out for {OPSET}."
            )
        program.save(path, external_data=False)
        if check:
            sizes = [inputs, [torch.cat([x, x[:1]]) for x in inputs], [x[:1] for x in inputs]]
            for tried in sizes if dynamic_batch else [inputs]:
                _compare(plain, path, names, tried)
    return path


def _compare(model: nn.Module, path: Path, names: list[str], inputs: list[Tensor]) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {name: x.detach().cpu().numpy() for name, x in zip(names, inputs, strict=True)}
    got = [torch.from_numpy(value) for value in session.run(None, feed)]
    error = max_relative_error(got, [tensor.cpu() for tensor in tensors_of(model(*inputs))])
    if not error <= _TOLERANCE:
        raise NumericalError(
            f"export_onnx: expected {path.name} to give the model's output within {_TOLERANCE:.0e}, got a relative "
            f"error of {error:.1e} at batch size {inputs[0].shape[0]}. Try another opset, or report the operator."
        )
