"""What a machine with a GPU is borrowed for, most important first, within a budget of seconds.

    make gpu BUDGET=480 OUT=DIR DATA=DIR STAGES=tests,bench,cifar,fit PROCESSES=12

It runs on a bare machine: any ``python3`` with torch, pytest, lightning, torchvision, torchmetrics, matplotlib and
scikit-learn, no environment of ours, no network. Stage ``fit`` needs jsonargparse, docstring-parser and typeshed-client
besides. Where they are missing, ``python3 -m pip install --no-index --no-deps --target SITE *.whl``  puts their wheels
into a folder, which PYTHONPATH then names; without them that stage fails at once, and one test is skipped.

A stage is one or several commands, run at once. It leaves ``logs/STAGE.log`` and ``stages/STAGE.json`` in the output
folder, beside what its commands write as they go; ``summary.md`` and ``summary.json`` are written anew whenever a stage
starts or ends. One that is out of time is asked to stop, then killed. The next call with the same folder leaves out
what is done and goes on with the rest: ``cifar`` trains what is not finished, ``fit`` goes on from its checkpoints. New
code wants a new folder.

The results are all but ``data`` and ``*.ckpt``; ``netdeconv report DIR/reproduce`` makes, on any machine, tables and
pictures of what ``cifar`` has finished.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_stages import GROUPS, ROOT, Stage, planned

__all__ = ["Run", "main"]

_GRACE = 12.0  # seconds from asking a command to stop to killing it; a checkpoint is written in less
_LEAST = 20.0  # seconds under which no stage is started: a slow machine takes as long to import torch
_TAIL = 40  # lines of a file in the summary
# So that a command can be stopped with all that it has started.
_OWN_GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}


class Run:
    """Stages, one after the other, until the time is up.

    Args:
        out: output folder.
        budget: seconds from now.
        environment: of the commands; ``None`` for our own.
        grace, least: seconds, see above.
    """

    def __init__(
        self,
        out: Path,
        budget: float,
        *,
        environment: Mapping[str, str] | None = None,
        grace: float = _GRACE,
        least: float = _LEAST,
    ) -> None:
        self.out = out
        self.end = time.monotonic() + budget
        self.environment = environment
        self.grace = grace
        self.least = least

    def carry_out(self, stages: Sequence[Stage]) -> bool:
        """Run what is not done; whether nothing has failed."""
        fine = True
        for stage in stages:
            if self._facts(stage)["state"] == "done" and not stage.always:
                continue
            limit = min(stage.seconds, self.end - time.monotonic() - self.grace)
            if limit < min(self.least, stage.seconds):
                self._note(stages, stage, state="no time left")
                continue
            start = time.monotonic()
            self._note(stages, stage, state="running", limit=round(limit, 1))
            codes, in_time = self._commands(stage, limit)
            state = "out of time" if not in_time else "failed" if any(codes) else "done"
            fine = fine and state != "failed"
            self._note(stages, stage, state=state, codes=codes, seconds=round(time.monotonic() - start, 1))
        return fine

    def _commands(self, stage: Stage, limit: float) -> tuple[list[int], bool]:
        """Exit codes, and whether all ended by themselves; nothing is left running, however this ends."""
        log = self.out / "logs" / f"{stage.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        end = time.monotonic() + limit
        running: list[subprocess.Popen[bytes]] = []
        with log.open("ab") as file:
            try:
                for command in stage.commands:
                    running.append(self._start(command, file))
                for one in running:
                    one.wait(max(0.0, end - time.monotonic()))
                in_time = True
            except subprocess.TimeoutExpired:
                in_time = False
            finally:
                _end(running, stage.stop, self.grace)
        return [one.returncode for one in running], in_time

    def _start(self, command: Sequence[str], log: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            **_OWN_GROUP,
        )

    def _facts(self, stage: Stage) -> dict[str, Any]:
        """What is known of a stage, from an earlier call too, if that was of the same commands."""
        try:
            found = json.loads((self.out / "stages" / f"{stage.name}.json").read_text())
        except (OSError, ValueError):
            found = {}
        return found if found.get("commands") == self._shown(stage) else {"name": stage.name, "state": "not yet"}

    def _shown(self, stage: Stage) -> list[str]:
        """The commands as they are on any machine, each once."""
        lines = [" ".join(command).replace(str(self.out), "OUT").replace(str(ROOT), ".") for command in stage.commands]
        return list(dict.fromkeys(lines))

    def _note(self, stages: Sequence[Stage], stage: Stage, **facts: Any) -> None:
        """Say what is known by now, in the stage's file, in the summary, and in a line."""
        at = time.strftime("%Y-%m-%d %H:%M:%S")
        about = {"name": stage.name, "commands": self._shown(stage), "at": at, **facts}
        _write(self.out / "stages" / f"{stage.name}.json", json.dumps(about, indent=1))
        found = [self._facts(one) for one in stages]
        _write(self.out / "summary.json", json.dumps(found, indent=1))
        _write(self.out / "summary.md", self._summary(stages, found))
        print(f"{at} {stage.name}: " + ", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)

    def _summary(self, stages: Sequence[Stage], found: Sequence[Mapping[str, Any]]) -> str:
        lines = ["| stage | state | seconds |", "| --- | --- | --: |"]
        lines += [f"| {facts['name']} | {facts['state']} | {facts.get('seconds', '')} |" for facts in found]
        for stage in stages:
            for pattern in (f"logs/{stage.name}.log", *stage.shown):
                for path in sorted(self.out.glob(pattern)):
                    end = path.read_text(errors="replace").splitlines()[-_TAIL:]
                    lines += ["", f"## {path.relative_to(self.out)}", "", "```", *end, "```"]
        return "\n".join(lines) + "\n"


def _end(running: Sequence[subprocess.Popen[bytes]], stop: signal.Signals, grace: float) -> None:
    """Ask the processes to stop, then kill those that have not, and whatever any of them has left."""
    asked = [one for one in running if one.poll() is None]
    for one in asked:
        os.killpg(one.pid, stop)
    end = time.monotonic() + grace
    for one in asked:
        with contextlib.suppress(subprocess.TimeoutExpired):
            one.wait(max(0.0, end - time.monotonic()))
    for one in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.pid, signal.SIGKILL)
        one.wait()


def _write(path: Path, text: str) -> None:
    """Write a file so that a reader never finds a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def _archive(data: Path | None) -> Path | None:
    """What has to be unpacked before anything can train; ``None`` where it is unpacked already, or not there."""
    if data is None or any((data / name).is_dir() for name in ("cifar-10-batches-py", "cifar10-jpeg")):
        return None
    return next(iter(sorted(data.glob("cifar10-jpeg.tar*"))), None)


def _environment(data: Path | None) -> dict[str, str]:
    """Of the commands: our package, one thread for each of many processes, logs as they are written, the data."""
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **ours, **({} if data is None else {"NETDECONV_DATA": str(data.resolve())})}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 1 where a stage has failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--budget", type=float, default=480, metavar="SECONDS", help="to end within (default: 480)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="DIR", help="default: runs/gpu")
    parser.add_argument("--data", type=Path, metavar="DIR", help="has cifar10-jpeg.tar.xz, or the data set as a folder")
    parser.add_argument("--stages", default=",".join(GROUPS), metavar="A,B", help="groups or names (default: all)")
    parser.add_argument("--processes", type=int, default=12, metavar="N", help="that share cifar (default: 12)")
    parser.add_argument("--toy", action="store_true", help="the same on a CPU in a minute or two, to try this out")
    args = parser.parse_args(arguments)
    out, archive = args.out.resolve(), _archive(args.data and args.data.resolve())
    everything = planned(out, archive=archive, processes=args.processes, toy=args.toy)
    wanted = set(args.stages.split(","))
    if unknown := wanted - {word for stage in everything for word in (stage.name, stage.group)}:
        names = ", ".join(dict.fromkeys([*GROUPS, *(stage.name for stage in everything)]))
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {names}")
    wanted |= {"data"} if wanted & {"cifar", "fit"} else set()
    # Ends what is running, too; and commands get Ctrl-C's signal although a shell started us in the background.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run = Run(out, args.budget, environment=_environment(args.data if archive is None else out / "data"))
    fine = run.carry_out([stage for stage in everything if wanted & {stage.name, stage.group}])
    print(f"See {out / 'summary.md'}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
