"""What the installed command ``netdeconv`` starts with, outside of the package, whose import loads torch for seconds.

Ctrl-C in these seconds ends the process as it ends any other program, without a traceback out of torch's import.
"""

import signal
import sys

__all__ = ["main"]


def main() -> int:
    """Load and run the command line; the exit code."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from netdeconv.cli import main as run

    signal.signal(signal.SIGINT, before)
    return run()


if __name__ == "__main__":
    sys.exit(main())
