"""What whitening costs: step time, memory, root, moments, and how it grows. See ``netdeconv bench --help``."""

from __future__ import annotations
