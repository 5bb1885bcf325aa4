"""What is in an ONNX file, and whether it computes what the network it came from does."""

from __future__ import annotations

import collections
import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from netdeconv import ConfigError

__all__ = ["contents", "largest_difference", "no_logging"]

_TOLERANCE = 1e-4  # float32 in another runtime, and folded weights: both sum in another order


def contents(path: Path) -> tuple[int, collections.Counter[str]]:
    """Opset of the standard operators in a file, and how often it uses each kind of node."""
    import onnx

    loaded = onnx.load(path, load_external_data=False)
    opset = next(entry.version for entry in loaded.opset_import if entry.domain in ("", "ai.onnx"))
    return opset, collections.Counter(node.op_type for node in loaded.graph.node)


def largest_difference(path: Path, images: Tensor, expected: list[Tensor]) -> float:
    """Largest difference between a file's outputs in onnxruntime and a network's, by the largest of its numbers.

    Raises:
        ConfigError: the two compute different things, or values that are not finite.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    got = [torch.from_numpy(value) for value in session.run(None, {session.get_inputs()[0].name: images.numpy()})]
    shapes = [[tuple(value.shape) for value in values] for values in (got, expected)]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"{path.name}: expected the network's outputs, of shapes {shapes[1]}, got {shapes[0]} in onnxruntime"
        )
    errors = [0.0]
    for ours, theirs in zip(got, expected, strict=True):
        scale = theirs.abs().max().clamp(min=torch.finfo(theirs.dtype).tiny)
        error = float((ours - theirs).abs().max() / scale)
        if not error <= _TOLERANCE:
            raise ConfigError(
                f"{path.name}: expected the network's output within {_TOLERANCE:.0e}, got a relative error of "
                f"{error:.1e} in onnxruntime"
            )
        errors.append(error)
    return max(errors)


@contextlib.contextmanager
def no_logging() -> Iterator[None]:
    """Silence the exporter, which logs tracebacks of what it tries first."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
