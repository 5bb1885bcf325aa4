"""The command ``netdeconv export``: from a checkpoint to an ONNX file that was tried in onnxruntime."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
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

from netdeconv import ConfigError, NumericalError, StatisticsWarning
from netdeconv.lab.checkpoint import load_checkpoint
from netdeconv.lab.networks import check_name, network
from netdeconv.lab.norms import NORMS, with_norm
from netdeconv.lab.onnx_file import contents, largest_difference, no_logging
from netdeconv.lab.saved import Saved, find_saved

__all__ = ["Exporter", "add_arguments", "run"]

_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_BATCH = 5  # neither the size that the exporter sees nor one that it tries


class Exporter(Protocol):
    """What ``netdeconv.surgery.export_onnx`` is."""

    def __call__(self, model: nn.Module, example: Tensor, path: Path, *, fused: bool, opset: int) -> Path:
        """Write the file, and try it."""


def add_arguments(parser: argparse.ArgumentParser, *, opset: int) -> None:
    """Arguments of the command; ``opset`` is the default."""
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="RUN|CHECKPOINT",
        help="run folder of netdeconv fit or a checkpoint of one; or a state dict, as torch.save or lightning wrote it",
    )
    parser.add_argument("out", type=Path, metavar="OUT.onnx", help="file to write")
    of_state_dicts = parser.add_argument_group("what a state dict does not say, and a checkpoint of netdeconv fit does")
    of_state_dicts.add_argument(
        "--network", metavar="NAME", help="network of the zoo, small, or torchvision:NAME (classification)"
    )
    of_state_dicts.add_argument(
        "--width", type=_positive(float), metavar="FACTOR", help="on the channels (default: 1)"
    )
    of_state_dicts.add_argument("--classes", type=_positive(int), metavar="N", help="outputs (default: 10)")
    of_state_dicts.add_argument(
        "--input-size", type=_positive(int), nargs=3, metavar=("C", "H", "W"), help="of one image (default: 3 32 32)"
    )
    of_state_dicts.add_argument(
        "--norm",
        choices=tuple(NORMS),
        help="how the network was trained; nd is netdeconv.convert, nd-paper the same with WhiteningConfig.paper(), "
        "bn the network as it is (default: nd)",
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
    saved = find_saved(args.checkpoint)
    if saved is None:
        raise ConfigError(f"{args.checkpoint}: expected a checkpoint, there is no such file")
    _check_out(saved.checkpoint, args.out)
    subject = _subject(args, saved)
    model = _network(subject)
    loaded = load_checkpoint(model, saved.checkpoint, norm=subject.norm, classes=subject.classes)
    model.eval()
    images = torch.randn(_BATCH, *subject.input_size, generator=torch.Generator().manual_seed(0))
    expected = _outputs(model, images, subject)
    with _folder_beside(args.out) as folder:
        path = folder / args.out.name
        try:
            with no_logging():
                export(model, images[:2], path, fused=not args.unfused, opset=args.opset)
        except NumericalError as error:
            raise ConfigError(str(error)) from error
        except RuntimeError as error:  # of the exporter, over several screens
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ConfigError(f"{subject.network} cannot be exported with opset {args.opset}: {reason}") from error
        except OSError as error:
            raise ConfigError(
                f"cannot write {args.out}: {error.strerror or error}. Nothing was changed there; make room"
            ) from error
        opset, nodes = contents(path)
        if opset != args.opset:
            raise ConfigError(f"--opset: expected {args.opset}, the exporter of torch could only write opset {opset}")
        difference = largest_difference(path, images, expected)
        os.replace(path, args.out)
    kinds = ", ".join(f"{count} {kind}" for kind, count in nodes.most_common())
    left_out = "" if not loaded.left_out or subject.of_fit else (
        f"; left out of the checkpoint: what is not under {loaded.prefix} ({loaded.left_out})"
    )  # fmt: skip
    print(
        f"{args.out}: opset {opset}; {kinds}; in onnxruntime the largest difference is {difference:.1e} of the largest "
        f"output; {subject.network} of {saved}{left_out}"
    )
    return 0


@dataclasses.dataclass(frozen=True)
class _Subject:
    """The network to export: the options, and where they are not given, what the checkpoint says of itself."""

    network: str
    width: float
    classes: int
    norm: str
    whitening: dict[str, Any]
    input_size: tuple[int, ...]
    task: str
    of_fit: bool
    saved: Saved


def _subject(args: argparse.Namespace, saved: Saved) -> _Subject:
    found = {**saved.settings, **saved.about}
    name = args.network or found.get("network")
    if name is None:
        raise ConfigError(f"{saved}: does not say of which network it is. Give --network, and --width and --norm")
    size, task = (3, 32, 32), "classification"
    if "name" in (options := dict(found.get("data") or {})):
        from netdeconv.lab.training.settings import build_data, resolved_data

        data: Any = build_data(resolved_data(options))
        side = data.image_size if isinstance(data.image_size, int) else size[-1]
        size, task = (data.in_channels, side, side), data.task
    return _Subject(
        network=name,
        width=found.get("width", 1.0) if args.width is None else args.width,
        classes=args.classes or found.get("classes") or 10,
        norm=args.norm or found.get("norm") or "nd",
        whitening=dict(found.get("whitening") or {}) if args.norm in (None, found.get("norm")) else {},
        input_size=tuple(args.input_size or size),
        task=task,
        of_fit=bool(saved.about),
        saved=saved,
    )


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


def _network(subject: _Subject) -> nn.Module:
    """The network as it was trained, with random weights."""
    check_name(subject.network)
    channels, height, width = subject.input_size
    model = network(
        subject.network,
        subject.width,
        subject.classes,
        task=subject.task,
        in_channels=channels if subject.of_fit or subject.network == "small" else None,
        image_size=height if height == width else None,
    )
    # The published procedure has smaller blocks in networks of torchvision that netdeconv fit has trained.
    return with_norm(model, subject.norm, subject.whitening, name=subject.network if subject.of_fit else None)


def _outputs(model: nn.Module, images: Tensor, subject: _Subject) -> list[Tensor]:
    """What the model returns, which also shows that it can be run."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error", StatisticsWarning)
            return [leaf for leaf in tree_leaves(model(images)) if isinstance(leaf, Tensor)]
    except StatisticsWarning as error:
        raise ConfigError(f"{subject.saved}: was saved before the first training step: {error}") from error
    except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
        size = " ".join(map(str, subject.input_size))
        raise ConfigError(f"{subject.network} cannot be run with --input-size {size}: {error}") from error


def _positive(kind: type[int] | type[float]) -> Any:
    """An argument type: a number above zero."""

    def number(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
        return value

    number.__name__ = kind.__name__
    return number
