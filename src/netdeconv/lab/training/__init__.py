"""Training from the command line: settings, run folders, checkpoints, stopping and going on."""

from __future__ import annotations
