"""What is run on a machine with a GPU, most important first: tests, benchmarks, trainings."""

from __future__ import annotations

import dataclasses
import math
import signal
from pathlib import Path

__all__ = ["GROUPS", "ROOT", "Stage", "planned"]

ROOT = Path(__file__).resolve().parents[1]
GROUPS = ("tests", "bench", "cifar", "fit")

_LAB = ("-m", "netdeconv.cli")
# The plugin turns its remark on parallel tests into a failure.
_PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark")


@dataclasses.dataclass(frozen=True)
class Stage:
    """Commands that are run at once.

    Args:
        name: of its files.
        group: one of :data:`GROUPS`, or ``"data"`` for what trainings need.
        commands: without the interpreter.
        seconds: most that it may take, also where the budget has more.
        shown: files whose end is in the summary, besides the log: patterns below the output folder.
        stop: what a command is asked to stop by. Tests and benchmarks write what they have at SIGINT, ``netdeconv fit``
            a checkpoint at SIGTERM.
        always: run it again although it is done, for it looks itself.
    """

    name: str
    group: str
    commands: tuple[tuple[str, ...], ...]
    seconds: float = math.inf
    shown: tuple[str, ...] = ()
    stop: signal.Signals = signal.SIGINT
    always: bool = False


def planned(out: Path, *, archive: Path | None = None, processes: int = 12, toy: bool = False) -> list[Stage]:
    """All stages in their order.

    Args:
        out: output folder.
        archive: CIFAR-10 as it has to be unpacked for the trainings; ``None`` where it is unpacked already.
        processes: that share the trainings of ``cifar``.
        toy: the same on a CPU in a minute or two, to try the tool out.
    """
    tests = ("tests/test_config.py",) if toy else ("-n", "6", "--timeout", "300", "tests/test_gpu.py")
    stages = [Stage("tests", "tests", ((*_PYTEST, *tests),), seconds=180)]
    for name, (options, seconds) in _benchmarks(toy).items():
        command = (*_LAB, "bench", "step", *options, "--out", str(out / "bench" / name))
        stages.append(Stage(f"bench-{name}", "bench", (command,), seconds))
    if archive is not None:
        unpack = (str(ROOT / "tools" / "pack_cifar.py"), str(archive), str(out / "data"))
        stages.append(Stage("data", "data", (unpack,), always=True))
    table = ("--size", "smoke") if toy else ("--size", "small", "--device", "cuda")
    command = (*_LAB, "reproduce", "cifar", *table, "--threads", "1", "--out", str(out / "reproduce"))
    stages.append(Stage("cifar", "cifar", (command,) * processes))
    fits = tuple((*_LAB, "fit", *options, "--out", str(out / "fit" / name)) for name, options in _fits(toy).items())
    stages.append(Stage("fit", "fit", fits, shown=("fit/*/metrics.csv",), stop=signal.SIGTERM))
    return stages


def _benchmarks(toy: bool) -> dict[str, tuple[tuple[str, ...], float]]:
    """Name -> options and most seconds: network deconvolution beside batch normalisation and none."""
    how = ("--dtype", "bfloat16", "--channels-last", "--no-paper")
    if toy:
        tiny = ("--width", "0.0625", "--batch", "4", "--rounds", "1", "--eval-rounds", "1", "--no-memory")
        return {"resnet18": (("--network", "resnet18", *how, *tiny), 180)}
    small = ("--network", "resnet18", *how, "--device", "cuda", "--matmul-precision", "high")
    large = ("--network", "torchvision:resnet50", "--classes", "1000", "--size", "224", *small[2:])
    compiled = ("--compile", "--compile-mode", "reduce-overhead", "--no-memory")  # memory is measured uncompiled
    return {
        "resnet50": (large, 180),
        "resnet18": (small, 150),
        "resnet18-compiled": ((*small, *compiled), 240),
        "resnet50-compiled": ((*large, *compiled), 420),
    }


def _fits(toy: bool) -> dict[str, tuple[str, ...]]:
    """Folder -> options: network deconvolution at one rate, batch normalisation at two."""
    where: tuple[str, ...] = ("--config", "cifar10-20-epochs", "--trainer.accelerator", "gpu", "--trainer.devices", "1")
    networks: tuple[str, ...] = ("resnet18", "vgg16")
    runs: tuple[tuple[str, str], ...] = (("nd", "0.1"), ("bn", "0.1"), ("bn", "0.03"))
    if toy:
        where = ("--config", "digits", "--data.image_size", "32", "--width", "0.0625", "--trainer.max_epochs", "1")
        networks, runs = networks[:1], runs[:2]
    how = ("--trainer.precision", "bf16-mixed", "--channels_last", "true", "--trainer.enable_progress_bar", "false")
    return {
        f"{network}-{norm}-{rate}": (*where, "--network", network, "--norm", norm, "--optimizer.lr", rate, *how)
        for network in networks
        for norm, rate in runs
    }
