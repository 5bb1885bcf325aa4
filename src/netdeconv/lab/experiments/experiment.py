"""What an experiment is: a claim of the paper, settings of three sizes, how it is run and how it is presented."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock

from netdeconv.lab.devices import DEVICES
from netdeconv.lab.store import RunStore, code_fingerprint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from netdeconv.lab.progress import Progress
    from netdeconv.lab.report import Table

__all__ = ["SIZES", "Experiment", "Picture", "Presentation", "Workspace"]

SIZES = ("smoke", "small", "paper")

# What the numbers of every training depend on; an experiment adds its own files.
LIBRARY = ("config.py", "functional", "nn", "surgery", "zoo", "lab/data", "lab/norms.py", "lab/networks.py")


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


class Workspace:
    """Where an experiment keeps its finished parts, and whom it tells how far it is.

    Args:
        folder: of this experiment.
        code: files and folders of the package that the numbers depend on.
        progress: bars and lines.
        publish: writes what there is of the result, so that a long run can be looked at before it has ended.
        device: where networks are trained, one of :data:`netdeconv.lab.devices.DEVICES`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        code: Sequence[str],
        progress: Progress,
        publish: Callable[[Mapping[str, Any]], None] = lambda _: None,
        device: str = "cpu",
    ) -> None:
        self.folder = folder
        self.store = RunStore(folder / "parts")
        self.code = code_fingerprint(code)
        self.progress = progress
        self.publish = publish
        self.device = device
        self.seconds = 0.0
        self._counted: set[Path] = set()

    def identity(self, code: str) -> dict[str, str]:
        """What every number depends on, besides the settings; a CPU is not named."""
        known = {"torch": torch.__version__, "code": code}
        return known if self.device == "cpu" else {**known, "device": self.device}

    def part(self, name: str, settings: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """A part's result as JSON gives it back: computed now, or found from an earlier run.

        It is found again while ``settings``, torch's version, the code and the device are the same. Where another
        process with the same folder is computing it, that one is waited for.

        Args:
            name: short and unique in this experiment, for the file and the progress.
            settings: everything that the part depends on, plain values.
            compute: does the work.
        """
        result = self._part(name, settings, compute, wait=True)
        assert result is not None
        return result

    def part_if_free(
        self, name: str, settings: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any] | None:
        """The same, but ``None`` at once where another process with the same folder is computing it."""
        return self._part(name, settings, compute, wait=False)

    def finished(self, name: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """A part's result if there is one, whichever process computed it."""
        identity = {**settings, **self.identity(self.code)}
        kept = self.store.load(name, identity)
        if kept is None:
            return None
        path = self.store.path(name, identity)
        if path not in self._counted:
            self._counted.add(path)
            self.seconds += kept["seconds"]
            self.progress.end_run()
        return dict(kept["result"])

    def alone(self) -> FileLock:
        """A block in which no other process with the same folder publishes."""
        return FileLock(self.folder / ".publish.lock")

    def _part(
        self, name: str, settings: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]], *, wait: bool
    ) -> dict[str, Any] | None:
        found = self.finished(name, settings)
        if found is not None:
            return found
        identity = {**settings, **self.identity(self.code)}
        with self.store.claimed(name, identity, wait=wait) as mine:
            if mine and self.store.load(name, identity) is None:
                start = time.perf_counter()
                result = compute()
                seconds = time.perf_counter() - start
                self.store.save(name, identity, {"result": result, "seconds": seconds})
                self.progress.say(f"{name}: {seconds:.1f} s")
        return self.finished(name, settings)


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
