"""The command ``netdeconv export``: from a checkpoint to an ONNX file that was tried in onnxruntime."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import netdeconv
from netdeconv import ConfigError, NumericalError, StatisticsWarning, WhiteningConfig
from netdeconv.lab.checkpoint import load_checkpoint
from netdeconv.lab.onnx_file import contents, largest_difference, no_logging
from netdeconv.zoo import NETWORKS

__all__ = ["Exporter", "add_arguments", "run"]

NORMS = ("nd", "nd-paper", "bn")

_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_BATCH = 5  # neither the size that the exporter sees nor one that it tries


class Exporter(Protocol):
    """What ``netdeconv.surgery.export_onnx`` is."""

    def __call__(self, model: nn.Module, example: Tensor, path: Path, *, fused: bool, opset: int) -> Path:
        """Write the file, and try it."""


def add_arguments(parser: argparse.ArgumentParser, *, opset: int) -> None:
    """Arguments of the command; ``opset`` is the default."""
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="state dict, as torch.save or lightning wrote it"
    )
    parser.add_argument("out", type=Path, metavar="OUT.onnx", help="file to write")
    parser.add_argument(
        "--network", required=True, metavar="NAME", help="network of the zoo, or torchvision:NAME (classification)"
    )
    parser.add_argument(
        "--width", type=_positive(float), default=1.0, metavar="FACTOR", help="on the channels (default: 1)"
    )
    parser.add_argument("--classes", type=_positive(int), default=10, metavar="N", help="outputs (default: 10)")
    parser.add_argument(
        "--input-size",
        type=_positive(int),
        nargs=3,
        default=(3, 32, 32),
        metavar=("C", "H", "W"),
        help="of one image (default: 3 32 32)",
    )
    parser.add_argument(
        "--norm",
        choices=NORMS,
        default="nd",
        help="how the network was trained: netdeconv.convert, the same with WhiteningConfig.paper(), as it is "
        "(default: nd)",
    )
    parser.add_argument("--unfused", action="store_true", help="keep the folding of statistics in the graph")
    parser.add_argument(
        "--opset", type=_positive(int), default=opset, metavar="N", help=f"of the ONNX operators (default: {opset})"
    )


def run(args: argparse.Namespace, export: Exporter) -> int:
    """Load, write, compare, print one line; the exit code.

    Raises:
        ConfigError: whatever keeps the file from being written; OUT is as it was before.
    """
    _require_packages()
    _check_out(args.checkpoint, args.out)
    model = _network(args)
    loaded = load_checkpoint(model, args.checkpoint, norm=args.norm, classes=args.classes)
    model.eval()
    images = torch.randn(_BATCH, *args.input_size, generator=torch.Generator().manual_seed(0))
    expected = _outputs(model, images, args)
    with _folder_beside(args.out) as folder:
        path = folder / args.out.name
        try:
            with no_logging():
                export(model, images[:2], path, fused=not args.unfused, opset=args.opset)
        except NumericalError as error:
            raise ConfigError(str(error)) from error
        except RuntimeError as error:  # of the exporter, over several screens
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ConfigError(f"{args.network} cannot be exported with opset {args.opset}: {reason}") from error
        opset, nodes = contents(path)
        if opset != args.opset:
            raise ConfigError(f"--opset: expected {args.opset}, the exporter of torch could only write opset {opset}")
        difference = largest_difference(path, images, expected)
        os.replace(path, args.out)
    kinds = ", ".join(f"{count} {kind}" for kind, count in nodes.most_common())
    beside = (
        f"; left out of the checkpoint: what is not under {loaded.prefix} ({loaded.left_out})"
        if loaded.left_out
        else ""
    )
    print(
        f"{args.out}: opset {opset}; {kinds}; in onnxruntime the largest difference is {difference:.1e} "
        f"of the largest output{beside}"
    )
    return 0


def _require_packages() -> None:
    for name in _PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f'needs {name}, which is not installed. Run: pip install "netdeconv[export]"')


def _check_out(checkpoint: Path, out: Path) -> None:
    """Refuse before the work what cannot be written after it."""
    if out.is_dir():
        raise ConfigError(f"{out}: expected a file to write, got a folder")
    if out.exists() and checkpoint.exists() and out.samefile(checkpoint):
        raise ConfigError(f"{out}: expected another file than the checkpoint to write")
    with _folder_beside(out):
        pass


@contextlib.contextmanager
def _folder_beside(out: Path) -> Iterator[Path]:
    """A temporary folder on the disk of ``out``, from where a finished file can be moved in one go."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=".netdeconv-", dir=out.parent)
    except OSError as error:
        raise ConfigError(f"cannot write to the folder {out.parent}: {error.strerror or error}") from None
    with folder as name:
        yield Path(name)


def _network(args: argparse.Namespace) -> nn.Module:
    """The network as it was trained, with random weights."""
    from netdeconv.lab.benchmark.contestants import network

    library, _, name = args.network.rpartition(":")
    known = _known(library)
    if (args.network if not library else f"torchvision:{name.lower()}") not in known:
        near = difflib.get_close_matches(args.network, [*known, *_known("torchvision", optional=True)], 1)
        hint = f"The nearest name is {near[0]}" if near else f"The zoo has {', '.join(sorted(NETWORKS))}"
        raise ConfigError(f"--network: there is no {args.network}. {hint}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torchvision, about the random weights of old networks
        model = network(args.network, args.width, args.classes)
    if args.norm == "bn":
        return model
    return netdeconv.convert(model, WhiteningConfig.paper() if args.norm == "nd-paper" else None)


def _known(library: str, *, optional: bool = False) -> list[str]:
    """Networks by the names that ``--network`` takes."""
    if library != "torchvision":
        return [] if library else list(NETWORKS)
    try:
        from torchvision import models
    except ModuleNotFoundError:
        if optional:
            return []
        raise
    return [f"torchvision:{name}" for name in models.list_models(module=models)]  # for classification only


def _outputs(model: nn.Module, images: Tensor, args: argparse.Namespace) -> list[Tensor]:
    """What the model returns, which also shows that it can be run."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error", StatisticsWarning)
            return [leaf for leaf in tree_leaves(model(images)) if isinstance(leaf, Tensor)]
    except StatisticsWarning as error:
        raise ConfigError(f"{args.checkpoint}: was saved before the first training step: {error}") from error
    except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
        size = " ".join(map(str, args.input_size))
        raise ConfigError(f"{args.network} cannot be run with --input-size {size}: {error}") from error


def _positive(kind: type[int] | type[float]) -> Any:
    """An argument type: a number above zero."""

    def number(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
        return value

    number.__name__ = kind.__name__
    return number
