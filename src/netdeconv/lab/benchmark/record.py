"""What every benchmark leaves behind: numbers with settings, versions and machine, tables, a picture; and progress."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from netdeconv import WhiteningConfig
from netdeconv.lab.benchmark.settings import Settings
from netdeconv.lab.plots import png
from netdeconv.lab.progress import Progress
from netdeconv.lab.report import Table
from netdeconv.lab.store import versions, write_json, write_whole

__all__ = ["describe", "machine", "start", "text", "write"]


def start(progress: Progress, stage: str, steps: int) -> None:
    """Begin a stage of so many steps: the bar anew in a terminal, a line anywhere else."""
    progress.start_run(stage, steps)
    if not progress.drawn:
        progress.say(f"{stage} ...")


def machine() -> dict[str, Any]:
    """The machine, and how busy it is."""
    found: dict[str, Any] = {
        "system": platform.system(),
        "processor": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "blas": "mkl" if torch.backends.mkl.is_available() else "other",
        "onednn": torch.backends.mkldnn.is_available(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
        found["float32_matmul_precision"] = torch.get_float32_matmul_precision()
    return found


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe(benchmark: str, settings: Settings) -> dict[str, Any]:
    """The part of the record that does not depend on what is measured; taken before the measurement."""
    return {
        "benchmark": benchmark,
        "command": ["netdeconv", *sys.argv[1:]],
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "settings": dataclasses.asdict(settings),
        "whitening": {
            "default": dataclasses.asdict(
                WhiteningConfig().resolved("dense", 64)
            ),  # of 3x3 convolutions of 64 channels
            "paper": dataclasses.asdict(WhiteningConfig.paper()),
        },
        "versions": versions(),
        "machine": machine(),
        "complete": False,
    }


def write(out: Path, record: dict[str, Any], figure: Figure | None) -> list[Path]:
    """Write the record and the picture; returns the files."""
    record["finished"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    record["machine"]["load_average_at_end"] = machine()["load_average"]
    name = record["benchmark"]
    files = [out / f"{name}.json"]
    write_json(files[0], record)
    if figure is not None:
        files.append(out / f"{name}.png")
        write_whole(files[1], png(figure))
    return files


def text(headline: str, tables: Mapping[str, Table], record: Mapping[str, Any]) -> str:
    """What the terminal shows."""
    place = record["machine"]
    where = place["gpu"] if record["settings"]["device"] == "cuda" else place["processor"]
    busy = place["load_average"]
    lines = [f"{headline}; {where}, {place['threads']} of {place['cores']} cores, torch {record['versions']['torch']}"]
    if busy and busy[0] > 0.5:
        lines.append(f"The machine was busy with something else at the start (load {busy[0]:.1f}).")
    return "\n\n".join(["\n".join(lines), *(f"{title}\n{table.to_text()}" for title, table in tables.items())])
