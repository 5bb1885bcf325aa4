"""The reference vectors: where they lie, how one is read, and what its settings are called here.

Each file holds one layer of the paper's authors, run in float64: some training calls, then one in evaluation
mode. The folder is the one that the environment variable ``NETDECONV_REFERENCE`` names, else
``../shared/reference`` beside the repository. Without it the tests that need it are skipped; a variable that
leads nowhere is an error.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

VECTOR_TOLERANCE = 1e-8  # absolute and relative, float64: what WhiteningConfig.paper() promises

# What the authors' constructors take where a file does not say.
CONV_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
WHITENING_DEFAULTS = {
    "conv2d": {"block": 64, "eps": 1e-5, "n_iter": 5, "momentum": 0.1, "sampling_stride": 3},
    "linear": {"block": 512, "eps": 1e-5, "n_iter": 5, "momentum": 0.1},
}
OUR_NAMES = {"block": "block_size", "n_iter": "num_iters"}


@dataclass(frozen=True)
class Step:
    """One training call: the gradients of ``(output * output_grad).sum()``, the running values after it."""

    input: Tensor
    output: Tensor
    output_grad: Tensor
    input_grad: Tensor
    grad_weight: Tensor
    grad_bias: Tensor | None
    running_mean: Tensor
    running_deconv: Tensor


@dataclass(frozen=True)
class Case:
    """One file: the authors' ``config`` as written, the parameters, the training calls, the evaluation."""

    name: str
    config: dict[str, Any]
    params: dict[str, Tensor]
    steps: list[Step]
    eval_input: Tensor
    eval_output: Tensor

    @property
    def kind(self) -> str:
        """``"conv2d"`` or ``"linear"``."""
        return str(self.config["kind"])

    @property
    def weight(self) -> Tensor:
        return self.params["weight"]

    @property
    def bias(self) -> Tensor | None:
        return self.params.get("bias")

    def conv_options(self) -> dict[str, int]:
        """stride, padding, dilation, groups of a convolution; empty for a linear layer."""
        if self.kind == "linear":
            return {}
        return {name: self.config.get(name, default) for name, default in CONV_DEFAULTS.items()}

    def whitening_options(self) -> dict[str, Any]:
        """block_size, eps, num_iters, momentum and, for a convolution, sampling_stride."""
        defaults = WHITENING_DEFAULTS[self.kind]
        return {OUR_NAMES.get(name, name): self.config.get(name, value) for name, value in defaults.items()}


def load_case(path: Path) -> Case:
    """Read one file."""
    with np.load(path) as archive:
        config = json.loads(str(archive["config"]))
        arrays = {name: torch.from_numpy(archive[name]) for name in archive.files if name != "config"}

    def step(k: int) -> Step:
        return Step(
            input=arrays[f"step{k}.input"],
            output=arrays[f"step{k}.output"],
            output_grad=arrays[f"step{k}.output_grad"],
            input_grad=arrays[f"step{k}.input_grad"],
            grad_weight=arrays[f"step{k}.grad.weight"],
            grad_bias=arrays.get(f"step{k}.grad.bias"),
            running_mean=arrays[f"step{k}.buffer.running_mean"],
            running_deconv=arrays[f"step{k}.buffer.running_deconv"],
        )

    count = sum(name.startswith("step") and name.endswith(".input") for name in arrays)
    return Case(
        name=path.stem,
        config=config,
        params={n.removeprefix("param."): a for n, a in arrays.items() if n.startswith("param.")},
        steps=[step(k) for k in range(count)],
        eval_input=arrays["eval.input"],
        eval_output=arrays["eval.output"],
    )


def reference_folder() -> Path | None:
    """The folder of the vectors, or None if there is none."""
    named = os.environ.get("NETDECONV_REFERENCE")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "reference"
    if any(folder.glob("*.npz")):
        return folder
    if named:
        raise pytest.UsageError(f"NETDECONV_REFERENCE={named}: expected a folder with .npz files, found none")
    return None


def vector_cases(kind: str | None = None) -> list[Any]:
    """One ``pytest.param(path)`` per file, marked ``reference_vectors``; one that skips if there are none.

    ``kind`` ("conv2d" or "linear") keeps the files whose config says so.
    """
    marker = pytest.mark.reference_vectors
    folder = reference_folder()
    if folder is None:
        skip = pytest.mark.skip(reason="no reference vectors: set NETDECONV_REFERENCE to their folder")
        return [pytest.param(None, marks=[marker, skip], id="absent")]
    paths = [path for path in sorted(folder.glob("*.npz")) if kind in (None, load_case(path).kind)]
    return [pytest.param(path, marks=marker, id=path.stem) for path in paths]


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    """A loaded case: ``@pytest.mark.parametrize("case", vector_cases(), indirect=True)``."""
    return load_case(request.param)
