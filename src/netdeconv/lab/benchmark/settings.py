"""The settings of every benchmark: a light file, so that the command line can check and explain them."""

from __future__ import annotations

import dataclasses
import os

from netdeconv import ConfigError
from netdeconv.lab.devices import DEVICES
from netdeconv.lab.options import check_fields, option

__all__ = ["MemorySettings", "MomentsSettings", "RootSettings", "ScalingSettings", "Settings", "StepSettings"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What all benchmarks share.

    Raises:
        ConfigError: a value out of range.
    """

    device: str = option("cpu", "where to compute", choices=DEVICES)
    matmul_precision: str = option(
        "highest",
        "of float32 products, as torch.set_float32_matmul_precision has it; with high, a GPU folds in TF32",
        choices=("highest", "high", "medium"),
    )
    threads: int | None = option(None, "CPU threads to compute with; torch's own choice if not given", kind=int)
    seed: int = option(0, "seed of weights and data")
    give_back: bool = option(
        False,
        "let the C library give freed memory back, as in a script of one's own; netdeconv fit keeps it. Memory is "
        "always measured so",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.threads or 1) > max(64, 4 * (os.cpu_count() or 1)):
            raise ConfigError(f"expected threads of at most a few per core, got {self.threads}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemorySettings(Settings):
    """Which network is run on what, for memory; time needs a little more."""

    network: str = option("resnet18", "a network of the zoo, or torchvision:NAME")
    width: float = option(1.0, "factor on the channels of a zoo network")
    classes: int = option(10, "outputs of the network")
    batch: int = option(128, "images in a batch")
    size: int = option(32, "height and width of the images")
    dtype: str = option("float32", "bfloat16 computes under autocast", choices=("float32", "bfloat16"))
    against: str = option(
        "bn,none,nd-paper",
        "normalisations beside network deconvolution, with commas between; bn/adamw and bn/muon have that optimiser",
    )
    no_paper: bool = option(False, "leave out the published procedure, which takes longest, most of all to compile")
    channels_last: bool = option(False, "keep images and weights with the channels last")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSettings(MemorySettings):
    """The training step and the evaluation of whole networks.

    Rounds are made a whole number of refresh periods.
    """

    compile: bool = option(False, "compile the networks with torch.compile")
    compile_mode: str = option(
        "default", "mode of torch.compile", choices=("default", "reduce-overhead", "max-autotune")
    )
    rounds: int = option(32, "training steps of each candidate, rounded up to whole refresh periods")
    eval_rounds: int = option(15, "evaluations of each candidate")
    warmup: int = option(2, "steps of each kind before anything is timed")
    no_memory: bool = option(False, "leave out peak memory, which takes a fresh process for each candidate")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compile_mode != "default" and not self.compile:
            raise ConfigError(f"compile_mode={self.compile_mode!r} needs --compile")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RootSettings(Settings):
    """Time and error of every solver of the inverse root."""

    sizes: tuple[int, ...] = option((27, 64, 144, 256, 288, 576), "sizes n of the n x n matrix")
    conditions: tuple[float, ...] = option(
        (1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7), "condition numbers, log-uniform spectrum"
    )
    iters: tuple[int, ...] = option((3, 5, 15), "numbers of Newton-Schulz steps whose map is computed")
    rounds: int = option(15, "timed calls of each solver")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MomentsSettings(Settings):
    """Time and error of the covariance by how many patches are looked at."""

    batch: int = option(128, "images in a batch")
    shapes: tuple[str, ...] = option(("64x32", "128x16", "256x8", "512x4", "512x2"), "maps, as CHANNELSxSIZE")
    samples: tuple[int, ...] = option((1024, 2048, 4096, 8192, 16384), "row budgets of the spread sampling")
    strides: tuple[int, ...] = option((3, 6), "strides of the published grid from the corner")
    refreshes: int = option(5, "refreshes, at other positions each, that errors are averaged over")
    rounds: int = option(7, "timed calls of each sampling")

    def __post_init__(self) -> None:
        super().__post_init__()
        for shape in self.shapes:
            self.parsed(shape)

    @staticmethod
    def parsed(shape: str) -> tuple[int, int]:
        """Channels and size of ``"64x32"``."""
        channels, _, size = shape.partition("x")
        if not (channels.isdigit() and size.isdigit() and int(channels) and int(size)):
            raise ConfigError(f"expected shapes like 64x32, channels and size of the map, got {shape!r}")
        return int(channels), int(size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingSettings(Settings):
    """One 3x3 convolution; one of channels, batch and map size is varied, the others stay at their base."""

    channels: tuple[int, ...] = option((64, 128, 256, 512, 1024), "channels to go through")
    batches: tuple[int, ...] = option((32, 64, 128, 256, 512), "batch sizes to go through")
    sizes: tuple[int, ...] = option((2, 4, 8, 16, 32), "map sizes to go through")
    base_channels: int = option(256, "channels while something else is varied")
    base_batch: int = option(128, "batch size while something else is varied")
    base_size: int = option(8, "map size while something else is varied")
    rounds: int = option(6, "ordinary steps of each candidate, and half as many with a refresh")
