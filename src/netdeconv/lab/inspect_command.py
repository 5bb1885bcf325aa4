"""The command ``netdeconv inspect``: what every layer of a network sees, as a table and as a page with pictures."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from netdeconv import ConfigError, NumericalError, ShapeError, StatisticsWarning, calibrate
from netdeconv.lab.names import nearest
from netdeconv.lab.norms import NORMS
from netdeconv.lab.saved import Saved, find_saved

__all__ = ["add_arguments", "run"]

_OUT = Path("runs/inspect")
_PHOTOGRAPHS, _NOISE = "photographs", "noise"
_SIZES = {"zoo": 32, "small": 8, "torchvision": 224, "timm": 224}


@dataclasses.dataclass(frozen=True)
class _Subject:
    """What is inspected: the network's description, its weights, and the data's options."""

    network: str
    width: float
    norm: str
    whitening: dict[str, Any]
    data: dict[str, Any]
    classes: int | None
    saved: Saved | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "what",
        metavar="RUN|CHECKPOINT|NETWORK",
        help="run folder of netdeconv fit or a checkpoint of one, a state dict with --network, or a network by name",
    )
    parser.add_argument("--network", metavar="NAME", help="network of a checkpoint that does not say so itself")
    parser.add_argument("--width", type=float, metavar="FACTOR", help="factor on its channels (default: 1)")
    parser.add_argument("--norm", choices=tuple(NORMS), help="its normalisation (default: nd)")
    parser.add_argument("--classes", type=int, metavar="N", help="its outputs (default: those of the data)")
    parser.add_argument(
        "--data",
        metavar="NAME",
        help="data set, folder of images, of which squares are cut, photographs, the two of scikit-learn, or noise "
        "(default: the data that the run was trained on, otherwise photographs)",
    )
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="folder of data sets (default: NETDECONV_DATA)")
    parser.add_argument("--image-size", type=int, metavar="N", help="side of the images, where they have several")
    parser.add_argument("--images", type=int, default=256, metavar="N", help="how many (default: 256)")
    parser.add_argument("--out", type=Path, default=_OUT, metavar="DIR", help=f"where to write (default: {_OUT})")


def run(args: argparse.Namespace) -> int:
    """Load, look, print the table, write the page; the exit code.

    Raises:
        ConfigError: a mistake of the user.
    """
    from netdeconv.inspect import inspect_layers
    from netdeconv.lab.inspect_cost import step_cost
    from netdeconv.lab.inspect_report import describe, write

    for name in ("images", "image_size", "classes", "width"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')}: expected a number above 0, got {value:g}")
    subject = _subject(args)
    images, about = _images(subject, args)
    net = _network(subject, about).eval()
    state = f"weights of {subject.saved}"
    try:
        if subject.saved is None:
            state = "random weights"
            if subject.norm.startswith("nd"):
                calibrate(net, images)
                state += ", statistics of these images"
        with warnings.catch_warnings():
            warnings.simplefilter("error", StatisticsWarning)
            views = inspect_layers(net, images)
            costs = step_cost(net, images)
    except StatisticsWarning as error:
        raise ConfigError(f"{subject.saved}: was saved before the first training step: {error}") from error
    except (ShapeError, NumericalError, RuntimeError, ValueError, AssertionError) as error:
        size = "x".join(map(str, images.shape[1:]))
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{subject.network} cannot be run on images of {size}: {reason}. Try another --data or --image-size"
        ) from error
    line = (
        f"{subject.network}, width {subject.width:g}, {NORMS[subject.norm].text}; {state}; {len(images)} images of "
        f"{subject.data['name']}, {'x'.join(map(str, images.shape[1:]))}, in evaluation mode"
    )
    print(f"{line}\n\n{describe(views, costs)}\n")
    for path in write(args.out, f"{subject.network}: its layers, before and after whitening", line, net, views, costs):
        print(path)
    return 0


def _subject(args: argparse.Namespace) -> _Subject:
    saved = find_saved(args.what)
    if saved is None and args.network is not None:
        raise ConfigError(f"{args.what}: expected a checkpoint with --network {args.network}, there is no such file")
    found = {} if saved is None else {**saved.settings, **saved.about}
    name = args.network or found.get("network") or (args.what if saved is None else None)
    if name is None:
        raise ConfigError(f"{args.what}: does not say of which network it is. Give --network, and --width and --norm")
    data = dict(found.get("data") or {})
    if args.data is not None and args.data != data.get("name"):
        data = {"name": args.data}
    return _Subject(
        network=name,
        width=found.get("width", 1.0) if args.width is None else args.width,
        norm=args.norm or found.get("norm") or "nd",
        whitening=dict(found.get("whitening") or {}) if args.norm in (None, found.get("norm")) else {},
        data=data or {"name": _PHOTOGRAPHS},
        classes=args.classes or found.get("classes"),
        saved=saved,
    )


def _images(subject: _Subject, args: argparse.Namespace) -> tuple[Tensor, dict[str, Any]]:
    """Images as the network gets them, and what it needs to know of them."""
    from netdeconv.lab.data import DATASETS, first_images, photographs
    from netdeconv.lab.training.settings import build_data, resolved_data

    name = subject.data["name"]
    about: dict[str, Any] = {"task": "classification", "in_channels": 3, "classes": 10, "image_size": None}
    if name in (_PHOTOGRAPHS, _NOISE) or (name not in DATASETS and Path(name).is_dir()):
        kind = subject.network.partition(":")[0].lower()
        side = args.image_size or _SIZES.get(kind, _SIZES["zoo"])
        if name == _NOISE:
            images = torch.randn(args.images, 3, side, side, generator=torch.Generator().manual_seed(0))
        else:
            images = _cuts(list(photographs()) if name == _PHOTOGRAPHS else _read(Path(name)), side, args.images)
        return images, {**about, "image_size": side}
    if name not in DATASETS:
        raise ConfigError(f"--data: there is no {name}. {nearest(str(name), [*DATASETS, _PHOTOGRAPHS, _NOISE])}")
    options = {**subject.data}
    for key, value in (("root", args.data_root), ("image_size", args.image_size)):
        if value is not None:
            options[key] = str(value) if isinstance(value, Path) else value
    data: Any = build_data(resolved_data(options))
    data.setup()
    images = first_images(data.test_dataloader(), args.images)
    size = data.image_size if isinstance(data.image_size, int) else None
    return images, {"task": data.task, "in_channels": data.in_channels, "classes": data.num_classes, "image_size": size}


def _read(folder: Path) -> list[Tensor]:
    """The images of a folder, values 0 to 1; other files are left out."""
    from torchvision.transforms.functional import to_tensor

    from netdeconv.lab.data.files import UNREADABLE, opened

    images = []
    for path in sorted(folder.iterdir()):
        with contextlib.suppress(*UNREADABLE):
            images.append(to_tensor(opened(str(path))))
    if not images:
        raise ConfigError(f"--data: expected a folder with images, got {folder}, which has none that can be read")
    return images


def _cuts(photos: Sequence[Tensor], side: int, count: int) -> Tensor:
    """Squares at random places of the photographs in turn, less the mean of each channel and over its deviation."""
    smallest = min(min(photo.shape[1:]) for photo in photos)
    if side > smallest:
        raise ConfigError(f"--image-size: expected at most {smallest}, the smallest side of the images, got {side}")
    drawn = torch.Generator().manual_seed(0)
    places = torch.rand(count, 2, generator=drawn, dtype=torch.float64).tolist()
    cuts = []
    for i, place in enumerate(places):
        photo = photos[i % len(photos)]
        top, left = (int(part * (size - side + 1)) for part, size in zip(place, photo.shape[1:], strict=True))
        cuts.append(photo[:, top : top + side, left : left + side])
    squares = torch.stack(cuts)
    return (squares - squares.mean((0, 2, 3), keepdim=True)) / squares.std((0, 2, 3), keepdim=True)


def _network(subject: _Subject, about: dict[str, Any]) -> nn.Module:
    from netdeconv.lab.checkpoint import load_checkpoint
    from netdeconv.lab.networks import network
    from netdeconv.lab.norms import with_norm

    described = dict(about)
    of_data = described.pop("classes")
    classes = of_data if subject.classes is None else subject.classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = network(subject.network, subject.width, classes, **described)
    net = with_norm(net, subject.norm, subject.whitening, name=subject.network)
    if subject.saved is not None:
        load_checkpoint(net, subject.saved.checkpoint, norm=subject.norm, classes=classes)
    return net
