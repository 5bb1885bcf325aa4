"""Run the tests of training as on other processors: python tools/try_processors.py [--workers N] [PYTEST OPTION ...]

What instructions a processor has decides how sums are ordered, and training amplifies the difference. Environment
variables hold back oneDNN, which computes convolutions, and torch's own kernels, and MKL's products with them, so that
one machine stands for several.

Of the 120 combinations 6 are run. They hold every pair of values of two settings, but for seeds, each of which is run
at least once: a test that depends on one setting, or on two together, meets the values that break it.

Prints a line for every run, and what pytest says of one that failed; the exit status is 1 if any did.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Run(NamedTuple):
    """One run of the tests of training; empty names let libraries use whatever the processor has."""

    onednn: str  # ONEDNN_MAX_CPU_ISA
    torch: str  # ATEN_CPU_CAPABILITY
    threads: int
    seed: int
    nudge: float

    def __str__(self) -> str:
        shown = f"oneDNN {self.onednn or 'free':5}  torch {self.torch or 'free':7}  threads {self.threads}"
        return f"{shown}  seed {self.seed}  inputs {f'moved by {self.nudge:g}' if self.nudge else 'as they are':14}"


RUNS = (
    Run("SSE41", "default", 1, 0, 0.0),
    Run("SSE41", "", 2, 1, 1e-6),
    Run("AVX2", "default", 2, 2, 0.0),
    Run("AVX2", "", 1, 3, 1e-6),
    Run("", "default", 1, 4, 1e-6),
    Run("", "", 2, 0, 0.0),
)


def environment(run: Run) -> dict[str, str]:
    """This process's variables, with those of the run set, or taken out where the run names none."""
    threads = str(run.threads)
    own = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    own |= {"ONEDNN_MAX_CPU_ISA": run.onednn, "ATEN_CPU_CAPABILITY": run.torch}
    return {name: value for name, value in {**os.environ, **own}.items() if value or name not in own}


def command(run: Run, workers: int, options: Sequence[str]) -> list[str]:
    """Pytest on the tests of training, in as many processes as leave each of them its threads."""
    varied = [f"--training-seed={run.seed}", f"--nudge={run.nudge:g}"]
    processes = max(1, workers // run.threads)
    return [sys.executable, "-m", "pytest", "-q", "-m", "training", f"-n{processes}", *varied, *options]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the tests of training as on other processors.")
    parser.add_argument("--workers", type=int, default=2, help="cores to use (default 2)")
    arguments, options = parser.parse_known_args(argv)
    failed = 0
    for run in RUNS:
        line = command(run, arguments.workers, options)
        done = subprocess.run(line, cwd=ROOT, env=environment(run), capture_output=True, text=True, check=False)
        closing = (done.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")
        print(f"{run}  {'ok    ' if done.returncode == 0 else 'FAILED'}  {closing}", flush=True)
        if done.returncode:
            failed += 1
            print(done.stdout + done.stderr, flush=True)
    print(f"{len(RUNS) - failed} of {len(RUNS)} runs passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
