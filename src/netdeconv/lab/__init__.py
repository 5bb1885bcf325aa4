"""Everything that trains and measures. Needs the extra: ``pip install "netdeconv[lab]"``."""

from __future__ import annotations
