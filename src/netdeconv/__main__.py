"""``python -m netdeconv``, the same as the command ``netdeconv``."""

import sys

from netdeconv.cli import main

if __name__ == "__main__":
    sys.exit(main())
