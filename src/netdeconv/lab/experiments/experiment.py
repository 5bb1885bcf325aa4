"""What an experiment is: a claim of the paper, settings of three sizes, how it is run and how it is presented."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from netdeconv.lab.devices import DEVICES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from netdeconv.lab.report import Table
    from netdeconv.lab.workspace import Workspace

__all__ = ["LIBRARY", "SIZES", "Experiment", "Picture", "Presentation"]

SIZES = ("smoke", "small", "paper")

# What the numbers of every training depend on; an experiment adds its own files.
LIBRARY = (
    "config.py", "functional", "nn", "surgery", "zoo", "lab/data", "lab/norms.py", "lab/rivals", "lab/networks.py",
    "lab/vit.py",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure of a presentation.

    Args:
        name: of the file, without ending.
        caption: a sentence or two.
        draw: fills an empty figure, whose size it may change.
    """

    name: str
    caption: str
    draw: Callable[[Figure], None]


@dataclasses.dataclass(frozen=True)
class Presentation:
    """What a result amounts to.

    Args:
        tables: with titles, and notes where they are needed.
        figures: in their order.
    """

    tables: Sequence[Table]
    figures: Sequence[Picture] = ()


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One claim of the paper and how it is re-run.

    Args:
        name: on the command line.
        claim: one sentence.
        source: where the paper says so.
        sizes: by each of :data:`SIZES`, settings of one dataclass whose fields are made by
            :func:`netdeconv.lab.options.option`. ``"smoke"`` needs no data and takes seconds; ``"small"`` is for two
            cores, real data, and minutes to hours; ``"paper"`` is the published setting.
        run: does it; the result is plain values, for JSON.
        present: makes tables and figures of a result, read from JSON: NaN and infinity are ``None``, tuples lists. It
            also takes what was published of a run that has not ended.
        code: files and folders of the package that the numbers depend on, besides the library itself.
        devices: where it can be run, out of :data:`netdeconv.lab.devices.DEVICES`; one that trains no network has
            numbers of the CPU.
    """

    name: str
    claim: str
    source: str
    sizes: Mapping[str, Any]
    run: Callable[[Any, Workspace], Mapping[str, Any]]
    present: Callable[[Mapping[str, Any]], Presentation]
    code: Sequence[str] = ()
    devices: Sequence[str] = DEVICES

    def __post_init__(self) -> None:
        if tuple(self.sizes) != SIZES:
            raise ValueError(f"{self.name}: expected settings for the sizes {SIZES}, got {tuple(self.sizes)}.")
        if len({type(settings) for settings in self.sizes.values()}) > 1:
            raise ValueError(f"{self.name}: expected settings of one class for all sizes.")
