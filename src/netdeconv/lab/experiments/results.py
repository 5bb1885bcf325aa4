"""An experiment from settings to files: result.json with all that is needed to judge it, tables, pictures."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from netdeconv import ConfigError
from netdeconv.lab.benchmark.record import machine
from netdeconv.lab.devices import device_of, threads
from netdeconv.lab.experiments.experiment import LIBRARY, Experiment, Presentation
from netdeconv.lab.experiments.registry import EXPERIMENTS, load
from netdeconv.lab.progress import Progress, quiet_lightning
from netdeconv.lab.store import read_json, versions, write_json, write_whole
from netdeconv.lab.workspace import Workspace

__all__ = ["Outcome", "carry_out", "draw", "markdown", "origin", "outcomes", "text"]

_RESULT = "result.json"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A finished experiment.

    Args:
        record: what is in its result.json.
        presentation: of its result.
        folder: holds result.json and one PNG for every figure.
    """

    record: Mapping[str, Any]
    presentation: Presentation
    folder: Path


def carry_out(
    experiment: Experiment,
    settings: Any,
    out: Path,
    *,
    command: str,
    size: str = "small",
    thread_count: int | None = None,
    device: str = "cpu",
    fresh: bool = False,
    show: bool = True,
) -> Outcome:
    """Run what is not finished yet, write result.json and the pictures.

    Args:
        experiment: which.
        settings: of its class.
        out: folder of all experiments; this one's is ``out/NAME``.
        command: that does the same again.
        size: one of :data:`SIZES`, for the record.
        thread_count: threads that torch computes with; ``None`` leaves them as they are.
        device: where networks are trained, one of :data:`netdeconv.lab.devices.DEVICES`.
        fresh: repeat what is finished.
        show: progress on standard error.

    Raises:
        ConfigError: data or a device that are not there, or settings that cannot apply.
        KeyboardInterrupt: stopped; the finished parts are kept.
    """
    if device not in experiment.devices:
        able = " or ".join(experiment.devices)
        raise ConfigError(f"{experiment.name} trains no network: expected --device {able}, got {device}")
    device_of(device)
    if thread_count is not None and thread_count < 1:
        raise ConfigError(f"expected threads of at least 1, got {thread_count}")
    folder = out / experiment.name
    folder.mkdir(parents=True, exist_ok=True)
    with threads(thread_count), quiet_lightning(), Progress(show=show) as progress:
        record: dict[str, Any] = {
            "experiment": experiment.name,
            "command": command,
            "size": size,
            "started": _now(),
            "settings": dataclasses.asdict(settings),
            "versions": versions(),
            "machine": machine(),
            "device": device,
        }

        def publish(result: Mapping[str, Any], *, complete: bool = False) -> None:
            ended = {"finished": _now(), "minutes": workspace.seconds / 60, "code": workspace.code}
            write_json(folder / _RESULT, {**record, **ended, "complete": complete, "result": result})

        code = (*LIBRARY, *experiment.code)
        workspace = Workspace(
            folder, code=code, progress=progress, publish=publish, device=device, fresh=fresh
        )
        publish(experiment.run(settings, workspace), complete=True)
    outcome = _read(folder)
    assert outcome is not None
    draw(outcome)
    return outcome


def outcomes(out: Path) -> list[Outcome]:
    """Every experiment that has a result in the folder, in the order of the registry.

    Raises:
        ConfigError: there is none, or one that other code has written.
    """
    found = []
    for name in EXPERIMENTS:
        try:
            outcome = _read(out / name)
        except Exception as error:
            raise ConfigError(
                f"{out / name / _RESULT}: expected a result that this version of netdeconv can show, got one that it "
                f"cannot: {error!r}. Remove the file, or run its command again"
            ) from error
        found += [] if outcome is None else [outcome]
    if not found:
        raise ConfigError(
            f"expected results of netdeconv reproduce in {out}, found no */{_RESULT}. "
            f"Run  netdeconv reproduce all --size smoke --out {out}"
        )
    return found


def _read(folder: Path) -> Outcome | None:
    record = read_json(folder / _RESULT)
    if not isinstance(record, dict) or record.get("experiment") not in EXPERIMENTS:
        return None
    return Outcome(record, load(record["experiment"]).present(record["result"]), folder)


def draw(outcome: Outcome) -> list[Path]:
    """Write the figures; returns the files."""
    from matplotlib.figure import Figure

    from netdeconv.lab.plots import png

    files = []
    for picture in outcome.presentation.figures:
        figure = Figure(figsize=(7.5, 4.2), dpi=130, layout="constrained")
        picture.draw(figure)
        files.append(outcome.folder / f"{picture.name}.png")
        write_whole(files[-1], png(figure))
    return files


def origin(record: Mapping[str, Any]) -> tuple[str, str]:
    """How the numbers came about: the command; machine, time, and what they are not good for."""
    place, found = record["machine"], record["versions"]
    load = (place.get("load_average") or [0])[0]
    busy = f" (load {load:.1f} at the start: other work ran beside)" if load > place["threads"] + 0.5 else ""
    gpu = f"{place['gpu']}, " if record.get("device") == "cuda" else ""
    line = (
        f"{gpu}{place['processor']}, {place['threads']} of {place['cores']} cores, torch "
        f"{found['torch']}; {_duration(record['minutes'])}{busy}; code {record['code']}, {record['finished'][:10]}."
    )
    line += " A trial run, too short to judge the claim by." * (record.get("size") == "smoke")
    line += " Not finished: these are the parts that are." * (not record["complete"])
    return record["command"], line


def _duration(minutes: float) -> str:
    return f"{60 * minutes:.0f} s" if minutes < 1 else f"{minutes:.1f} minutes"


def text(outcome: Outcome) -> str:
    """For the terminal."""
    experiment = load(outcome.record["experiment"])
    parts = [f"{experiment.name}: {experiment.claim} ({experiment.source})"]
    for table in outcome.presentation.tables:
        parts.append("\n".join(filter(None, [table.title, table.to_text(), table.note])))
    return "\n\n".join([*parts, "; ".join(origin(outcome.record))])


def markdown(found: Sequence[Outcome], *, pictures: str | None = None) -> str:
    """One section for each experiment.

    Args:
        found: in their order.
        pictures: folder of the pictures as the page sees it; ``None`` for that of each experiment.
    """
    sections = []
    for outcome in found:
        experiment = load(outcome.record["experiment"])
        parts = [f"## {experiment.name}", f"Claim ({experiment.source}): {experiment.claim}"]
        for table in outcome.presentation.tables:
            parts += [f"**{table.title}**" if table.title else "", table.to_markdown(), table.note]
        for picture in outcome.presentation.figures:
            folder = outcome.folder.name if pictures is None else pictures
            parts += [f"![{picture.caption}]({folder}/{picture.name}.png)"]
        command, rest = origin(outcome.record)
        parts.append(f"`{command}`; {rest}")
        sections.append("\n\n".join(filter(None, parts)))
    return "\n\n".join(sections) + "\n"


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
