"""Progress of many short trainings: two bars in a terminal, a few plain lines anywhere else."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

from tqdm import tqdm

from netdeconv import NonFiniteWarning

__all__ = ["Progress", "quiet_lightning"]

# Lightning on newer torch; and its remark, on machines with a GPU, that we asked for the CPU.
_NOT_OURS = (r".*isinstance\(treespec, LeafSpec\)", r"GPU available but not used")

_FORMAT = "{desc:<44} {percentage:3.0f}% |{bar:24}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"


class Progress:
    """Bars for a list of runs: one over all runs, one over the training steps of the present run.

    They are drawn only where the stream is a terminal, and are gone when the block ends. :meth:`say` prints a
    line that stays.

    Args:
        stream: where to draw; standard error when ``None``.
        show: ``False`` prints nothing at all.
    """

    def __init__(self, *, stream: TextIO | None = None, show: bool = True) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.show = show
        self.drawn = show and self.stream.isatty()
        options: dict[str, Any] = {
            "file": self.stream, "disable": not self.drawn, "leave": False, "bar_format": _FORMAT
        }  # fmt: skip
        self._all = tqdm(total=0, desc="all runs", unit="run", position=0, **options)
        self._run = tqdm(total=1, unit="step", position=1, **options)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._run.close()
        self._all.close()

    def expect(self, runs: int) -> None:
        """So many more runs there will be."""
        self._all.total += runs
        self._all.refresh()

    def start_run(self, name: str, steps: int) -> None:
        """The present run's bar begins anew."""
        if self.drawn:
            self._run.reset(total=steps)
            self._run.set_description_str(name)

    def step(self) -> None:
        """One training step is done."""
        self._run.update()

    def end_run(self) -> None:
        """One run is done."""
        self._all.update()

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        if self.show:
            tqdm.write(line, file=self.stream)
            self.stream.flush()


@contextlib.contextmanager
def quiet_lightning(*, diverging: bool = False) -> Iterator[None]:
    """No Lightning notices about hardware and finished loops, nor whitening's about a run that diverges.

    All other warnings and errors still come through. What was set before is restored.

    Args:
        diverging: let whitening's warnings through.
    """
    import lightning.pytorch  # noqa: F401 - sets the levels of its loggers when it is loaded

    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            if not diverging:
                warnings.filterwarnings("ignore", category=NonFiniteWarning)
            for message in _NOT_OURS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
