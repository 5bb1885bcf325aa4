"""Writing a trained network as an ONNX file, and trying the file."""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from netdeconv.errors import ConfigError, NumericalError
from netdeconv.surgery.batches import max_relative_error, tensors_of
from netdeconv.surgery.fuse import fuse

__all__ = ["OPSET", "export_onnx"]

OPSET = 20
_TOLERANCE = 1e-4  # float32 in another runtime, which sums in another order


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
        _require(name)
    plain = fuse(model) if fused else model
    if any(module.training for module in plain.modules()):
        raise ConfigError(
            "export_onnx: expected a model in evaluation mode, got training mode. Call model.eval() first."
        )
    inputs = [example] if isinstance(example, Tensor) else list(example)
    if dynamic_batch:  # a size of one would be taken for a constant
        inputs = [x if x.shape[0] > 1 else torch.cat([x, x]) for x in inputs]
    names = [f"input{index}" if len(inputs) > 1 else "input" for index in range(len(inputs))]
    batch = torch.export.Dim("batch", min=1)
    path = Path(path)
    with torch.no_grad(), _quiet():
        torch.onnx.export(
            plain,
            tuple(inputs),
            path,
            input_names=names,
            opset_version=opset,
            dynamo=True,
            external_data=False,
            dynamic_shapes=tuple({0: batch} for _ in inputs) if dynamic_batch else None,
            verbose=False,
        )
        _require_opset(path, opset)
        if check:
            sizes = [inputs, [torch.cat([x, x[:1]]) for x in inputs], [x[:1] for x in inputs]]
            for tried in sizes if dynamic_batch else [inputs]:
                _compare(plain, path, names, tried)
    return path


def _require_opset(path: Path, opset: int) -> None:
    """The exporter writes another version, without an error, where it cannot write the one asked for."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    written = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if written != opset:
        path.unlink()
        raise ConfigError(
            f"export_onnx: expected an opset that the exporter can write, got opset={opset}, for which it wrote "
            f"{written}. Pass opset={written}, or leave it out for {OPSET}."
        )


def _compare(model: nn.Module, path: Path, names: list[str], inputs: list[Tensor]) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {name: x.detach().cpu().numpy() for name, x in zip(names, inputs, strict=True)}
    got = [torch.from_numpy(value) for value in session.run(None, feed)]
    expected = [tensor.cpu() for tensor in tensors_of(model(*inputs))]
    error = max_relative_error(got, expected)
    if not error <= _TOLERANCE:
        raise NumericalError(
            f"export_onnx: expected {path.name} to give the model's output within {_TOLERANCE:.0e}, got a relative "
            f"error of {error:.1e} at batch size {inputs[0].shape[0]}. Try another opset, or report the operator."
        )


def _require(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"export_onnx: expected the package {name} to be installed, got {error}. pip install 'netdeconv[export]'."
        ) from error


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporter warns about its own internals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield
