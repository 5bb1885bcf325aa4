"""The settings of every benchmark: a light file, so that the command line can check and explain them."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from netdeconv import ConfigError

__all__ = ["MemorySettings", "MomentsSettings", "RootSettings", "ScalingSettings", "Settings", "StepSettings"]


def _option(default: Any, text: str, *, kind: type | None = None, choices: tuple[str, ...] | None = None) -> Any:
    """A field that is also an option of the command line; ``kind`` where the default does not tell the type."""
    return dataclasses.field(default=default, metadata={"help": text, "kind": kind, "choices": choices})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What all benchmarks share.

    Raises:
        ConfigError: a value out of range.
    """

    device: str = _option("cpu", "where to compute", choices=("cpu", "cuda"))
    threads: int | None = _option(None, "CPU threads to compute with; torch's own choice if not given", kind=int)
    seed: int = _option(0, "seed of weights and data")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            if choices is not None and value not in choices:
                raise ConfigError(f"expected {field.name} one of {', '.join(choices)}, got {value!r}")
            several = isinstance(value, tuple)
            if several and not value:
                raise ConfigError(f"expected at least one of {field.name}, got none")
            for number in value if several else (value,):
                if field.name != "seed" and isinstance(number, (int, float)) and number <= 0 and number is not False:
                    raise ConfigError(f"expected {field.name} above 0, got {number:g}")
        if (self.threads or 1) > max(64, 4 * (os.cpu_count() or 1)):
            raise ConfigError(f"expected threads of at most a few per core, got {self.threads}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemorySettings(Settings):
    """Which network is run on what, for memory; time needs a little more."""

    network: str = _option("resnet18", "a network of the zoo, or torchvision:NAME")
    width: float = _option(1.0, "factor on the channels of a zoo network")
    classes: int = _option(10, "outputs of the network")
    batch: int = _option(128, "images in a batch")
    size: int = _option(32, "height and width of the images")
    dtype: str = _option("float32", "bfloat16 computes under autocast", choices=("float32", "bfloat16"))
    channels_last: bool = _option(False, "keep images and weights with the channels last")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSettings(MemorySettings):
    """The training step and the evaluation of whole networks.

    Rounds are made a whole number of refresh periods.
    """

    compile: bool = _option(False, "compile the networks with torch.compile")
    compile_mode: str = _option(
        "default", "mode of torch.compile", choices=("default", "reduce-overhead", "max-autotune")
    )
    rounds: int = _option(32, "training steps of each contestant, rounded up to whole refresh periods")
    eval_rounds: int = _option(15, "evaluations of each contestant")
    warmup: int = _option(2, "steps of each kind before anything is timed")
    no_memory: bool = _option(False, "leave out peak memory, which takes a fresh process for each contestant")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compile_mode != "default" and not self.compile:
            raise ConfigError(f"compile_mode={self.compile_mode!r} needs --compile")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RootSettings(Settings):
    """Time and error of every solver of the inverse root."""

    sizes: tuple[int, ...] = _option((27, 64, 144, 256, 288, 576), "sizes n of the n x n matrix")
    conditions: tuple[float, ...] = _option(
        (1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7), "condition numbers, log-uniform spectrum"
    )
    iters: tuple[int, ...] = _option((5, 15), "numbers of Newton-Schulz steps whose map is computed")
    rounds: int = _option(15, "timed calls of each solver")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MomentsSettings(Settings):
    """Time and error of the covariance by how many patches are looked at."""

    batch: int = _option(128, "images in a batch")
    shapes: tuple[str, ...] = _option(("64x32", "128x16", "256x8", "512x4", "512x2"), "maps, as CHANNELSxSIZE")
    samples: tuple[int, ...] = _option((1024, 2048, 4096, 8192, 16384), "row budgets of the spread sampling")
    strides: tuple[int, ...] = _option((3, 6), "strides of the published grid from the corner")
    refreshes: int = _option(5, "refreshes, at other positions each, that errors are averaged over")
    rounds: int = _option(7, "timed calls of each sampling")

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

    channels: tuple[int, ...] = _option((64, 128, 256, 512, 1024), "channels to go through")
    batches: tuple[int, ...] = _option((32, 64, 128, 256, 512), "batch sizes to go through")
    sizes: tuple[int, ...] = _option((2, 4, 8, 16, 32), "map sizes to go through")
    base_channels: int = _option(256, "channels while something else is varied")
    base_batch: int = _option(128, "batch size while something else is varied")
    base_size: int = _option(8, "map size while something else is varied")
    rounds: int = _option(6, "ordinary steps of each contestant, and half as many with a refresh")
