"""Where an experiment keeps its finished parts: one JSON file each, found again by all that its numbers depend on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout

from netdeconv.lab.store import code_fingerprint, finite, read_json, write_json

if TYPE_CHECKING:
    from netdeconv.lab.progress import Progress

__all__ = ["Workspace"]

_POLL = 0.5  # seconds between two looks at what another process is computing


class Workspace:
    """Finished parts of an experiment, shared by all processes with the same folder.

    Args:
        folder: of the experiment; the parts are kept below it.
        code: files and folders of the package that the numbers depend on.
        progress: bars and lines.
        publish: writes what there is of the result, so that a long run can be looked at before it has ended.
        device: where networks are trained, one of :data:`netdeconv.lab.devices.DEVICES`.
        fresh: take no part from an earlier run.

    Attributes:
        code: fingerprint of the code.
        seconds: that all parts have taken, whenever they ran.
    """

    def __init__(
        self,
        folder: Path,
        *,
        code: Sequence[str],
        progress: Progress,
        publish: Callable[[Mapping[str, Any]], None] = lambda _: None,
        device: str = "cpu",
        fresh: bool = False,
    ) -> None:
        self.folder = folder
        self.code = code_fingerprint(code)
        self.progress = progress
        self.publish = publish
        self.device = device
        self.seconds = 0.0
        self._fresh = fresh
        self._counted: set[Path] = set()
        self._computed: set[Path] = set()
        self._looked = False

    def part(
        self,
        name: str,
        settings: Mapping[str, Any],
        compute: Callable[[], Mapping[str, Any]],
        *,
        beside: Path | None = None,
    ) -> dict[str, Any]:
        """A part's result as JSON gives it back: computed now, or found from an earlier run.

        It is found again while ``settings``, torch's version, the code and the device are the same. Where another
        process with the same folder is computing it, that one is waited for; a process that dies lets go of it.

        Args:
            name: short and unique in this experiment, for the file and the progress.
            settings: everything that the part depends on, plain values.
            compute: does the work.
            beside: file that ``compute`` writes as well; where it is missing, the part is not finished.
        """
        while (result := self.part_if_free(name, settings, compute, beside=beside)) is None:
            time.sleep(_POLL)
        return result

    def part_if_free(
        self,
        name: str,
        settings: Mapping[str, Any],
        compute: Callable[[], Mapping[str, Any]],
        *,
        beside: Path | None = None,
    ) -> dict[str, Any] | None:
        """The same, but ``None`` at once where another process with the same folder is computing it."""
        if (found := self.finished(name, settings, beside=beside)) is not None:
            return found
        path = self.path(name, settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        try:
            if self._fresh or self._kept(path, settings, beside) is None:
                self._say_what_is_not_used()
                start = time.perf_counter()
                result = compute()
                seconds = time.perf_counter() - start
                write_json(path, {"settings": self._identity(settings), "result": result, "seconds": seconds})
                self.progress.say(f"{name}: {seconds:.1f} s")
            self._computed.add(path)
        finally:
            lock.release()
        with contextlib.suppress(OSError):
            Path(lock.lock_file).unlink()
        return self.finished(name, settings, beside=beside)

    def finished(
        self, name: str, settings: Mapping[str, Any], *, beside: Path | None = None
    ) -> dict[str, Any] | None:
        """A part's result if there is one, whichever process computed it."""
        path = self.path(name, settings)
        kept = self._kept(path, settings, beside)
        if kept is None or (self._fresh and path not in self._computed):
            return None
        if path not in self._counted:
            self._counted.add(path)
            self.seconds += kept["seconds"]
            self.progress.end_run()
        return dict(kept["result"])

    def path(self, name: str, settings: Mapping[str, Any], ending: str = "json") -> Path:
        """The file of a part's result, or of what belongs to it."""
        text = json.dumps(finite(self._identity(settings)), sort_keys=True)
        return self.folder / "parts" / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.{ending}"

    def alone(self) -> FileLock:
        """A block in which no other process with the same folder publishes."""
        return FileLock(self.folder / ".publish.lock")

    def _identity(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What a part's numbers depend on; a CPU is not named."""
        known = {**settings, "torch": torch.__version__, "code": self.code}
        return known if self.device == "cpu" else {**known, "device": self.device}

    def _kept(self, path: Path, settings: Mapping[str, Any], beside: Path | None) -> dict[str, Any] | None:
        found = read_json(path)
        same = found and found.get("settings") == finite(self._identity(settings))
        return found if same and (beside is None or beside.is_file()) else None

    def _say_what_is_not_used(self) -> None:
        """Say once that all results there are by other code or another torch; later some are by today's."""
        if self._looked:
            return
        self._looked = True
        today, files = self._identity({}), list((self.folder / "parts").glob("*.json"))
        known = [(read_json(file) or {}).get("settings", {}) for file in files]
        if files and all(any(one.get(key) != today[key] for key in ("code", "torch")) for one in known):
            self.progress.say(
                f"{self.folder / 'parts'}: the {len(files)} results there are by other code or another torch than "
                "today's, and not used"
            )
